//! Requests that the shard died of, kept from coming back for a while.

use crate::Time;
use std::collections::VecDeque;

/// How long a request is kept out.
const SENTENCE: Time = Time::from_secs(600);
/// Requests remembered; beyond that the oldest is let in again.
const PLACES: usize = 256;

/// Fingerprints of culprits, and when each may come again, earliest first.
#[derive(Debug, Default)]
pub struct Quarantine {
    kept: VecDeque<(Time, u64)>,
}

impl Quarantine {
    /// Keeps a request out from now on.
    pub fn put(&mut self, now: Time, fingerprint: u64) {
        self.kept.retain(|&(_, other)| other != fingerprint);
        if self.kept.len() == PLACES {
            self.kept.pop_front();
        }
        self.kept.push_back((now + SENTENCE, fingerprint));
    }

    /// How much longer a request is kept out, if it is.
    pub fn remaining(&mut self, now: Time, fingerprint: u64) -> Option<Time> {
        while self.kept.front().is_some_and(|&(until, _)| until <= now) {
            self.kept.pop_front();
        }
        let kept = self.kept.iter().find(|&&(_, other)| other == fingerprint);
        kept.map(|&(until, _)| until.saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_kept_out_for_ten_minutes_from_its_last_offence() {
        let (mut quarantine, second) = (Quarantine::default(), Time::from_secs(1));
        quarantine.put(Time::ZERO, 7);
        quarantine.put(second, 8);
        quarantine.put(2 * second, 7);
        assert_eq!(quarantine.remaining(600 * second, 7), Some(2 * second));
        assert_eq!(quarantine.remaining(600 * second, 8), Some(second));
        assert_eq!(quarantine.remaining(600 * second, 9), None);
        assert_eq!(quarantine.remaining(602 * second, 7), None);
        assert!(quarantine.kept.is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let mut quarantine = Quarantine::default();
        (0..10_000).for_each(|fingerprint| quarantine.put(Time::ZERO, fingerprint));
        assert_eq!(quarantine.kept.len(), PLACES);
        assert_eq!(quarantine.remaining(Time::ZERO, 9_999), Some(SENTENCE));
    }
}
