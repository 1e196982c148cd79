//! Steps on their way: what the shards were told in this epoch and have not answered.

use crate::step::{Placement, Reply, Row, RowReply, Violation};
use crate::{AdapterId, Time};
use std::collections::VecDeque;

/// The epoch that serves.
#[derive(Debug)]
pub(crate) struct Epoch {
    pub(crate) number: u64,
    /// Steps planned so far.
    pub(crate) steps: u64,
    /// Those without an answer, in the order of their numbers.
    pub(crate) in_flight: VecDeque<InFlight>,
    /// Released with the next step.
    pub(crate) release: Vec<Released>,
    /// Handles of adapters displaced with the next step.
    pub(crate) displace: Vec<u64>,
    /// Placed with the next step.
    pub(crate) place: Vec<Placement>,
    /// When the last answer came.
    answered_at: Time,
}

/// A step that the shards compute, or will when they answered the one before it.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) rows: Vec<Row>,
    pub(crate) released: Vec<Released>,
    pub(crate) planned: Time,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Released {
    pub(crate) sequence: u64,
    pub(crate) adapter: Option<AdapterId>,
}

#[cfg(test)]
impl Released {
    /// The same with its adapter taken for free already.
    pub(crate) fn unheld(mut self, adapters: &mut crate::Adapters) -> Self {
        self.adapter
            .take()
            .into_iter()
            .for_each(|adapter| adapters.unhold(adapter));
        self
    }
}

impl Epoch {
    /// One without steps.
    pub(crate) fn new(number: u64) -> Self {
        Self {
            number,
            steps: 0,
            in_flight: VecDeque::new(),
            release: Vec::new(),
            displace: Vec::new(),
            place: Vec::new(),
            answered_at: Time::ZERO,
        }
    }

    /// Steps that were answered.
    pub(crate) fn answered(&self) -> u64 {
        self.steps - self.in_flight.len() as u64
    }

    /// Whether nothing is in flight and nothing is left to tell.
    pub(crate) fn is_quiet(&self) -> bool {
        self.in_flight.is_empty() && self.release.is_empty() && self.displace.is_empty()
    }

    /// Takes the step out of flight that `reply` answers, which must be the oldest; also the time that it took, which
    /// begins when the shards were done with the one before it.
    pub(crate) fn land(&mut self, now: Time, reply: &Reply) -> Result<(InFlight, Time), Violation> {
        let (got, expected) = (reply.number, self.answered() + 1);
        let Some(oldest) = self.in_flight.front().filter(|_| got == expected) else {
            return Err(Violation::Number { got, expected });
        };
        // A violation leaves the step in flight: the end of the epoch will blame its rows.
        check(reply, &oldest.rows)?;
        let begun = oldest.planned.max(self.answered_at);
        self.answered_at = now;
        match self.in_flight.pop_front() {
            Some(step) => Ok((step, now.saturating_sub(begun))),
            None => Err(Violation::Number { got, expected }),
        }
    }
}

fn check(reply: &Reply, rows: &[Row]) -> Result<(), Violation> {
    let same = |(row, answer): (&Row, &RowReply)| row.sequence == answer.sequence;
    if reply.rows.len() != rows.len() || !rows.iter().zip(&reply.rows).all(same) {
        return Err(Violation::Rows {
            number: reply.number,
        });
    }
    for (row, answer) in rows.iter().zip(&reply.rows) {
        if answer.error.is_none() && row.sample == answer.tokens.is_empty() {
            return Err(Violation::Tokens {
                sequence: row.sequence,
                got: answer.tokens.len(),
                asked: row.sample,
            });
        }
        let kept = &answer.tokens[..answer.tokens.len().saturating_sub(1)];
        if !row.guesses.starts_with(kept) {
            let sequence = row.sequence;
            return Err(Violation::Guess { sequence });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_step_took_begins_when_the_one_before_it_was_answered() {
        let (mut epoch, ms) = (Epoch::new(1), Time::from_millis);
        let mut send = |planned| {
            epoch.steps += 1;
            epoch.in_flight.push_back(InFlight {
                rows: Vec::new(),
                released: Vec::new(),
                planned,
            });
        };
        [ms(5), ms(6), ms(40)].into_iter().for_each(&mut send);
        let mut took = |number, now| {
            let reply = Reply {
                epoch: 1,
                number,
                rows: Vec::new(),
            };
            epoch.land(now, &reply).map(|(_, took)| took)
        };
        assert_eq!(took(1, ms(15)), Ok(ms(10)));
        assert_eq!(took(2, ms(35)), Ok(ms(20)));
        assert_eq!(took(3, ms(41)), Ok(ms(1)));
    }
}
