//! The model processes of one instance. They compute together, so they start, fall and start again together.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::commands::{self, Site};
use crate::failure::Failure;
use crate::process::{Ending, Output, Process, Spawner};

/// A hung shard's time to write its stacks, between SIGABRT and SIGKILL.
const ABORT_TIME: Duration = Duration::from_secs(1);

/// All ranks, or the wait for their next start.
#[derive(Default)]
pub struct ShardGroup {
    processes: Vec<Process>,
    /// A rank died: the others are ending, and this long after the last of them all start again.
    fallen: Option<Duration>,
    start_at: Option<Instant>,
    kill_at: Option<Instant>,
    /// Starts so far. Each start meets at a rendezvous of its own.
    generation: u32,
}

impl ShardGroup {
    /// Starts every rank.
    pub fn start(&mut self, site: Site<'_>, spawner: &Spawner<'_>) -> Result<(), Failure> {
        (self.start_at, self.kill_at) = (None, None);
        for rank in 0..site.plan.place.shards() {
            let name = format!("shard-{rank}");
            let _left_by_the_last_one = fs::remove_file(site.run.join(&name));
            let invocation = commands::shard(site, rank, self.generation);
            self.processes
                .push(spawner.spawn(&name, &invocation, &[], Output::Logged)?);
        }
        self.generation += 1;
        Ok(())
    }

    /// No process is left.
    pub fn is_empty(&self) -> bool {
        self.processes.is_empty()
    }

    /// A rank died and the group has not started again.
    pub fn is_falling(&self) -> bool {
        self.fallen.is_some()
    }

    /// Sends a signal to every rank.
    pub fn signal(&self, signal: Signal) {
        self.processes
            .iter()
            .for_each(|process| process.signal(signal));
    }

    /// Ends ranks that make no progress, after time to write their stacks. Says whether there were any to end: a group
    /// that is falling already is not the one that was complained of.
    pub fn abort(&mut self, now: Instant) -> bool {
        if self.is_falling() || self.is_empty() {
            return false;
        }
        self.signal(Signal::SIGABRT);
        self.kill_at = Some(now + ABORT_TIME);
        true
    }

    /// The ranks that have ended since the last call.
    pub fn reap(&mut self) -> Vec<(Process, Ending)> {
        let mut ended = Vec::new();
        let mut index = 0;
        while index < self.processes.len() {
            match self.processes[index].reap() {
                Some(how) => ended.push((self.processes.remove(index), how)),
                None => index += 1,
            }
        }
        ended
    }

    /// Ends what is left of the group, which is of no use any more, and starts all of it again after a wait.
    pub fn fall(&mut self, wait: Duration) {
        self.fallen = Some(wait);
        // A rank that is writing its stacks may go on until its time is up.
        if self.kill_at.is_none() {
            self.signal(Signal::SIGKILL);
        }
    }

    /// When there is something to do next.
    pub fn deadline(&self) -> Option<Instant> {
        self.start_at.into_iter().chain(self.kill_at).min()
    }

    /// Does what is due. Says whether the group is to be started now.
    pub fn act_on_time(&mut self, now: Instant) -> bool {
        if self.kill_at.take_if(|at| *at <= now).is_some() {
            self.signal(Signal::SIGKILL);
        }
        if self.is_empty()
            && let Some(wait) = self.fallen.take()
        {
            self.start_at = Some(now + wait);
        }
        self.start_at.take_if(|at| *at <= now).is_some()
    }
}
