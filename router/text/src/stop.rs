//! Stop strings in a stream of text.

use std::ops::Range;

/// What one piece of text set free.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pushed {
    /// Text that belongs to the answer.
    pub text: String,
    /// Which stop string ended the answer, if one did; nothing after it counts.
    pub stopped: Option<usize>,
}

/// Finds stop strings across the borders of pieces.
///
/// The stop whose last byte comes first wins; of several that end together, the longest. Where the answer ends before
/// the stop, text that may still become one is held back; where it ends with it, nothing is.
pub struct StopMatcher {
    stops: Vec<String>,
    /// Whether the stop belongs to the answer.
    keeps: bool,
    /// The end of the text, from where a stop may have begun.
    held: String,
    /// Bytes of `held` that were set free already.
    told: usize,
}

impl StopMatcher {
    /// Watches for `stops`, which are no part of the answer; empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.to_vec(),
            keeps: false,
            held: String::new(),
            told: 0,
        }
    }

    /// Watches for `stops`, the first of which is the end of the answer; empty ones are ignored.
    pub fn keeping(stops: &[String]) -> Self {
        Self {
            keeps: true,
            ..Self::new(stops)
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
        let (free, stopped) = match self.first_match() {
            Some((at, stop)) if self.keeps => (at.end, Some(stop)),
            Some((at, stop)) => (at.start, Some(stop)),
            None if self.keeps => (self.held.len(), None),
            None => (self.held.len() - self.suspicious(), None),
        };
        let text = self.held[self.told..free].to_owned();
        let settled = match stopped {
            Some(_) => self.held.len(),
            None => self.held.len() - self.suspicious(),
        };
        self.held.drain(..settled);
        self.told = free.saturating_sub(settled);
        Pushed { text, stopped }
    }

    /// Gives what was held back: the answer ended and no stop came of it.
    pub fn flush(&mut self) -> String {
        let told = std::mem::take(&mut self.told);
        std::mem::take(&mut self.held).split_off(told)
    }

    /// Whether text is held back.
    pub fn holds(&self) -> bool {
        self.held.len() > self.told
    }

    /// Where the winning match is and which stop it is.
    fn first_match(&self) -> Option<(Range<usize>, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(number, stop)| Some((self.held.find(stop.as_str())?, stop.len(), number)))
            .min_by_key(|&(start, length, _)| (start + length, start))
            .map(|(start, length, number)| (start..start + length, number))
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
