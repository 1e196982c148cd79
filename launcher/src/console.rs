//! One log for the whole tree: the launcher's own events and every line of every child, readable or as JSON.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

/// How much of a child's output is kept for the report of its death, in bytes.
const TAIL_BYTES: usize = 64 * 1024;
/// The longest line that is passed on whole, in bytes.
const LINE_BYTES: u64 = 256 * 1024;

/// How serious an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Info,
    Warn,
    Error,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Info => "INFO",
            Self::Warn => "WARN",
            Self::Error => "ERROR",
        }
    }
}

/// Where all lines go. Cheap to clone.
#[derive(Clone)]
pub struct Console {
    json: bool,
    sink: Arc<Mutex<dyn Write + Send>>,
}

impl Console {
    /// Lines on standard error, each a JSON object if so asked.
    pub fn new(json: bool) -> Self {
        Self::into(json, std::io::stderr())
    }

    fn into(json: bool, sink: impl Write + Send + 'static) -> Self {
        Self {
            json,
            sink: Arc::new(Mutex::new(sink)),
        }
    }

    /// An event of the launcher itself.
    pub fn event(&self, level: Level, message: impl AsRef<str>) {
        for line in message.as_ref().lines() {
            let event = Map::from_iter([
                ("level".into(), level.name().into()),
                ("message".into(), line.into()),
            ]);
            self.write("launcher", event);
        }
    }

    /// An ordinary event.
    pub fn info(&self, message: impl AsRef<str>) {
        self.event(Level::Info, message);
    }

    /// Something an operator should know of.
    pub fn warn(&self, message: impl AsRef<str>) {
        self.event(Level::Warn, message);
    }

    /// Something that ends a process.
    pub fn error(&self, message: impl AsRef<str>) {
        self.event(Level::Error, message);
    }

    /// A line that a child wrote: a JSON event, or anything else.
    pub fn line(&self, process: &str, line: &str) {
        match serde_json::from_str::<Map<String, Value>>(line) {
            Ok(event) if event.contains_key("message") || event.contains_key("fields") => {
                self.write(process, event)
            }
            _ if self.json => {
                self.write(process, Map::from_iter([("message".into(), line.into())]))
            }
            _ => self.print(&format!("{} {process}: {line}", clock())),
        }
    }

    /// Reads a child's pipe to its end, on a thread of its own, so that the pipe never fills.
    pub fn pump(&self, process: &str, pipe: impl Read + Send + 'static) -> Tail {
        let tail = Tail::default();
        let (kept, console, process) = (Arc::clone(&tail.lines), self.clone(), process.to_owned());
        let (ended, at_end) = mpsc::sync_channel::<()>(0);
        thread::spawn(move || {
            let mut reader = BufReader::new(pipe);
            let mut line = Vec::new();
            while matches!(
                reader
                    .by_ref()
                    .take(LINE_BYTES)
                    .read_until(b'\n', &mut line),
                Ok(1..)
            ) {
                let text = String::from_utf8_lossy(&line);
                // A progress bar redraws its line; the last picture is what counts.
                let text = text.trim_end().rsplit('\r').next().unwrap_or_default();
                if !text.is_empty() {
                    keep(&kept, text);
                    console.line(&process, text);
                }
                line.clear();
            }
            drop(ended);
        });
        Tail {
            at_end: Some(at_end),
            ..tail
        }
    }

    fn write(&self, process: &str, mut event: Map<String, Value>) {
        if self.json {
            event.entry("timestamp").or_insert_with(|| clock().into());
            event.entry("level").or_insert_with(|| "INFO".into());
            event.insert("process".into(), process.into());
            self.print(&json!(event).to_string());
        } else {
            self.print(&readable(process, &event));
        }
    }

    fn print(&self, line: &str) {
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        // A log that nobody reads any more is no reason to stop serving.
        let _unread = sink.write_all(format!("{line}\n").as_bytes());
    }
}

/// The last lines of a child.
#[derive(Default)]
pub struct Tail {
    lines: Arc<Mutex<VecDeque<String>>>,
    at_end: Option<Receiver<()>>,
}

impl Tail {
    /// The last `count` lines, after the pipe has been read to its end. A grandchild may hold the pipe open, so the
    /// wait is short.
    pub fn last(&self, count: usize) -> Vec<String> {
        if let Some(at_end) = &self.at_end {
            let _either = at_end.recv_timeout(Duration::from_millis(300));
        }
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines
            .iter()
            .skip(lines.len().saturating_sub(count))
            .cloned()
            .collect()
    }
}

fn keep(tail: &Mutex<VecDeque<String>>, line: &str) {
    let mut lines = tail.lock().unwrap_or_else(PoisonError::into_inner);
    lines.push_back(line.to_owned());
    let mut held: usize = lines.iter().map(String::len).sum();
    while held > TAIL_BYTES {
        held -= lines.pop_front().map_or(held, |line| line.len());
    }
}

/// `time LEVEL process: message key=value`.
fn readable(process: &str, event: &Map<String, Value>) -> String {
    let text = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    // The router's events hold their message and keys one level down.
    let fields = event.get("fields").and_then(Value::as_object);
    let find = |name: &str| event.get(name).or_else(|| fields?.get(name)).map(text);
    let silent = [
        "timestamp",
        "level",
        "message",
        "target",
        "fields",
        "process",
        "span",
        "spans",
        "filename",
        "line_number",
    ];
    let keys = event
        .iter()
        .chain(fields.into_iter().flatten())
        .filter(|(key, _)| !silent.contains(&key.as_str()));
    let keys: String = keys
        .map(|(key, value)| format!(" {key}={}", text(value)))
        .collect();
    format!(
        "{} {:<5} {process}: {}{keys}",
        find("timestamp").unwrap_or_else(clock),
        find("level").unwrap_or_else(|| "INFO".to_owned()),
        find("message").unwrap_or_default(),
    )
}

/// The time of day in RFC 3339, UTC, to the millisecond.
fn clock() -> String {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z",
        since.subsec_millis()
    )
}

/// The date `days` after 1 January 1970, by counting in cycles of 400 years that begin in March.
fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (cycle, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let from_march = (5 * day + 2) / 153;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    (
        cycle * 400 + year + u64::from(month <= 2),
        month,
        day - (153 * from_march + 2) / 5 + 1,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sheet(Arc<Mutex<Vec<u8>>>);

    impl Write for Sheet {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("a sheet").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn written(json: bool, write: impl FnOnce(&Console)) -> String {
        let sheet = Sheet::default();
        write(&Console::into(json, sheet.clone()));
        let bytes = sheet.0.lock().expect("a sheet").clone();
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn events_of_children_are_readable_and_name_their_process() {
        let shard =
            r#"{"timestamp":"T","level":"INFO","message":"loaded","target":"kvrun","seconds":1.5}"#;
        let router = r#"{"timestamp":"T","level":"WARN","fields":{"message":"slow","route":"/generate"},"target":"r"}"#;
        let text = written(false, |console| {
            console.line("shard-0", shard);
            console.line("router", router);
        });
        assert_eq!(
            text,
            "T INFO  shard-0: loaded seconds=1.5\nT WARN  router: slow route=/generate\n"
        );
    }

    #[test]
    fn every_line_of_a_json_log_is_an_object_with_its_process() {
        let text = written(true, |console| {
            console.info("one\ntwo");
            console.line("shard-1", "Segmentation fault");
            console.line(
                "shard-1",
                r#"{"timestamp":"T","level":"ERROR","message":"x"}"#,
            );
            console.line("shard-1", "{\"no\":1}");
        });
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).expect(line))
            .collect();
        let processes: Vec<_> = lines
            .iter()
            .map(|line| line["process"].as_str().expect("a process"))
            .collect();
        assert_eq!(
            processes,
            ["launcher", "launcher", "shard-1", "shard-1", "shard-1"]
        );
        assert!(
            lines
                .iter()
                .all(|line| line["timestamp"].is_string() && line["level"].is_string())
        );
    }

    #[test]
    fn a_pipe_is_read_to_its_end_whatever_is_in_it() {
        let mut bytes = b"first\n\xff\xfe not text\nbar 1%\rbar 100%\n".to_vec();
        bytes.extend(std::iter::repeat_n(b'x', 3 * TAIL_BYTES));
        bytes.extend(b"\nlast");
        let text = written(false, |console| {
            let tail = console.pump("shard-0", std::io::Cursor::new(bytes));
            assert_eq!(tail.last(1), ["last"]);
            assert!(tail.last(99).iter().map(String::len).sum::<usize>() <= TAIL_BYTES);
        });
        assert!(text.contains("\u{fffd}\u{fffd} not text") && text.contains("shard-0: bar 100%"));
    }

    #[test]
    fn dates_follow_the_calendar() {
        assert_eq!(
            [0, 59, 11_016, 20_777].map(date),
            [(1970, 1, 1), (1970, 3, 1), (2000, 2, 29), (2026, 11, 20)]
        );
    }
}
