//! Dates for chat templates: the part of `strftime` that models use, in UTC.

const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Formats a moment given in seconds since 1970; directives that are not known stay as they are.
pub fn strftime(format: &str, unix_seconds: u64) -> String {
    let days = unix_seconds / 86_400;
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (
        unix_seconds / 3_600 % 24,
        unix_seconds / 60 % 60,
        unix_seconds % 60,
    );
    let weekday = DAYS[((days + 4) % 7) as usize];
    let month_name = MONTHS[(month - 1) as usize];
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let mut padded = true;
        let mut directive = letters.next();
        if directive == Some('-') {
            padded = false;
            directive = letters.next();
        }
        let number = |value: u64| {
            if padded {
                format!("{value:02}")
            } else {
                value.to_string()
            }
        };
        match directive {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&number(year % 100)),
            Some('m') => out.push_str(&number(month)),
            Some('d') => out.push_str(&number(day)),
            Some('H') => out.push_str(&number(hour)),
            Some('I') => out.push_str(&number((hour + 11) % 12 + 1)),
            Some('M') => out.push_str(&number(minute)),
            Some('S') => out.push_str(&number(second)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a count of days since 1970, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Counted from 1 March of year 0, so that leap days end a year; eras are the calendar's period of 400 years.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_read_as_python_writes_them() {
        // 2024-02-29 13:05:09 UTC, a Thursday.
        let leap = 1_709_211_909;
        assert_eq!(strftime("%d %b %Y", leap), "29 Feb 2024");
        assert_eq!(
            strftime("%A, %B %-d; %H:%M:%S %I%p %%", leap),
            "Thursday, February 29; 13:05:09 01PM %"
        );
        assert_eq!(strftime("%Y-%m-%d %y", 0), "1970-01-01 70");
        assert_eq!(strftime("%Q %", 0), "%Q %");
    }
}
