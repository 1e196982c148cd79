//! Stop strings in a stream of text.

/// What one piece of text set free.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pushed {
    /// Text that belongs to the answer.
    pub text: String,
    /// Which stop string ended the answer, if one did; nothing after it counts.
    pub stopped: Option<usize>,
}

/// Finds stop strings across the borders of pieces. It holds back only text that may still become one.
///
/// The stop whose last byte comes first wins; of several that end together, the longest.
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// Watches for `stops`; empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.to_vec(),
            held: String::new(),
        }
    }

    /// Takes the next piece. After a stop was found, start a new matcher.
    pub fn push(&mut self, piece: &str) -> Pushed {
        if self.stops.is_empty() {
            return Pushed {
                text: piece.to_owned(),
                stopped: None,
            };
        }
        self.held.push_str(piece);
        if let Some((start, stop)) = self.first_match() {
            self.held.truncate(start);
            return Pushed {
                text: std::mem::take(&mut self.held),
                stopped: Some(stop),
            };
        }
        let rest = self.held.split_off(self.held.len() - self.suspicious());
        Pushed {
            text: std::mem::replace(&mut self.held, rest),
            stopped: None,
        }
    }

    /// Gives what was held back: the answer ended and no stop came of it.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether text is held back.
    pub fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Start of the winning match and which stop it is.
    fn first_match(&self) -> Option<(usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(number, stop)| Some((self.held.find(stop.as_str())?, stop.len(), number)))
            .min_by_key(|&(start, length, _)| (start + length, start))
            .map(|(start, _, number)| (start, number))
    }

    /// Length of the longest end of the held text that is a proper beginning of a stop.
    fn suspicious(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let most = stop.len().saturating_sub(1).min(held.len());
            (1..=most)
                .rev()
                .find(|&length| held.ends_with(&stop.as_bytes()[..length]))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}
