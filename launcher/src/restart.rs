//! When a process that died is started again. Pure: time is an argument.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Deaths further apart than this do not count together.
const WINDOW: Duration = Duration::from_secs(600);
/// The wait before each attempt in a row; the last one stays.
const BACKOFF: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(15),
];

/// Counts the deaths of one process group.
#[derive(Debug)]
pub struct RestartPolicy {
    /// Deaths within the window that are one too many; 0 for no end.
    budget: usize,
    deaths: VecDeque<Instant>,
    in_a_row: usize,
}

impl RestartPolicy {
    /// A policy that gives up at the `budget`th death within ten minutes, or never at 0.
    pub fn new(budget: u32) -> Self {
        Self {
            budget: budget as usize,
            deaths: VecDeque::new(),
            in_a_row: 0,
        }
    }

    /// Notes a death: how long to wait before the next start, or nothing if there is to be none.
    pub fn died(&mut self, now: Instant) -> Option<Duration> {
        self.deaths
            .retain(|death| now.duration_since(*death) < WINDOW);
        if self.deaths.is_empty() {
            self.in_a_row = 0;
        }
        self.deaths.push_back(now);
        let wait = BACKOFF[self.in_a_row.min(BACKOFF.len() - 1)];
        self.in_a_row += 1;
        (self.budget == 0 || self.deaths.len() < self.budget).then_some(wait)
    }

    /// Notes that the group served again, so that its next death is not one in a row.
    pub fn served(&mut self) {
        self.in_a_row = 0;
    }

    /// Deaths within the last ten minutes.
    pub fn deaths(&self) -> usize {
        self.deaths.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(wait: Option<Duration>) -> Option<f64> {
        wait.map(|wait| wait.as_secs_f64())
    }

    #[test]
    fn a_group_that_keeps_dying_waits_longer_each_time_and_is_given_up() {
        let (mut policy, now) = (RestartPolicy::new(5), Instant::now());
        let waits: Vec<_> = (0..5)
            .map(|second| seconds(policy.died(now + Duration::from_secs(second))))
            .collect();
        assert_eq!(waits, [Some(0.1), Some(1.0), Some(5.0), Some(15.0), None]);
    }

    #[test]
    fn a_group_that_served_in_between_starts_at_once_but_still_spends_its_budget() {
        let (mut policy, now) = (RestartPolicy::new(3), Instant::now());
        assert_eq!(seconds(policy.died(now)), Some(0.1));
        policy.served();
        assert_eq!(seconds(policy.died(now)), Some(0.1));
        policy.served();
        assert_eq!(policy.died(now), None);
    }

    #[test]
    fn old_deaths_are_forgiven() {
        let (mut policy, now) = (RestartPolicy::new(2), Instant::now());
        assert!(policy.died(now).is_some());
        assert_eq!(seconds(policy.died(now + WINDOW)), Some(0.1));
        assert_eq!(policy.died(now + WINDOW + Duration::from_secs(1)), None);
    }

    #[test]
    fn a_budget_of_zero_has_no_end() {
        let (mut policy, now) = (RestartPolicy::new(0), Instant::now());
        assert!((0..1000).all(|_| policy.died(now).is_some()));
    }
}
