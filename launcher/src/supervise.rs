//! Keeps the tree alive: starts router and shards together, restarts what dies, and ends all of it in order.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::commands::{self, Site};
use crate::console::Console;
use crate::control::{Control, Message};
use crate::failure::{Code, Failure};
use crate::process::{Ending, Output, Process, Spawner};
use crate::restart::RestartPolicy;
use crate::shard_group::ShardGroup;
use crate::signals::{Asks, Signals};

/// The shards' time to end by themselves once the router is gone.
const SHARD_STOP_TIME: Duration = Duration::from_secs(5);
/// What the router gets on top of the time for open answers, and all that is left after a second signal.
const ROUTER_STOP_TIME: Duration = Duration::from_secs(5);
const SECOND_SIGNAL_TIME: Duration = Duration::from_secs(1);
/// How much of a dead process's output is repeated.
const REPORT_LINES: usize = 15;

/// All that stays the same while the tree lives.
pub struct Tree<'a> {
    pub site: Site<'a>,
    pub listener: &'a TcpListener,
    pub spawner: &'a Spawner<'a>,
    pub console: &'a Console,
    /// When the launcher was started.
    pub started: Instant,
}

/// How the tree ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Open answers were given their time.
    Drained,
    /// A second signal cut that time short.
    Interrupted(Signal),
}

/// Runs the tree until it is asked to end, or has to.
pub fn run(tree: &Tree<'_>, signals: &Signals) -> Result<End, Failure> {
    let mut supervisor = Supervisor::new(tree);
    let outcome = supervisor.serve(signals);
    if outcome.is_err() {
        supervisor.end_streams(signals)?;
    }
    outcome
}

enum Phase {
    Starting,
    Serving,
    /// The router finishes what is open. `failed`: it had to be killed, or said that it could not.
    Draining {
        until: Instant,
        failed: bool,
    },
    /// The router is gone; the shards end.
    Ending {
        until: Instant,
        failed: bool,
    },
}

struct Supervisor<'a> {
    tree: &'a Tree<'a>,
    phase: Phase,
    asks: Asks,
    second_signal: Option<Signal>,
    router: Option<Process>,
    router_policy: RestartPolicy,
    router_at: Option<Instant>,
    control: Option<Control>,
    shards: ShardGroup,
    shard_policy: RestartPolicy,
}

impl<'a> Supervisor<'a> {
    fn new(tree: &'a Tree<'a>) -> Self {
        let policy = || RestartPolicy::new(tree.site.settings.operation.restart_budget);
        Self {
            tree,
            phase: Phase::Starting,
            asks: Asks::default(),
            second_signal: None,
            router: None,
            router_policy: policy(),
            router_at: None,
            control: None,
            shards: ShardGroup::default(),
            shard_policy: policy(),
        }
    }

    fn serve(&mut self, signals: &Signals) -> Result<End, Failure> {
        self.start_router()?;
        self.shards.start(self.tree.site, self.tree.spawner)?;
        loop {
            let wake =
                signals.wait(self.control.as_ref().map(AsFd::as_fd), self.next_deadline())?;
            let now = Instant::now();
            if let Some(signal) = wake.stop {
                self.stop(signal, now);
            }
            if wake.readable {
                self.listen(now);
            }
            self.reap_shards(now)?;
            self.reap_router(now)?;
            self.act_on_time(now)?;
            if let Some(end) = self.end() {
                return end;
            }
        }
    }

    /// Lets the router tell its callers that there will be no more. All processes end when this value goes.
    fn end_streams(&mut self, signals: &Signals) -> Result<(), Failure> {
        let until = Instant::now() + SECOND_SIGNAL_TIME;
        let Some(router) = &mut self.router else {
            return Ok(());
        };
        router.signal(Signal::SIGTERM);
        // The first signal asks for a drain, which without shards has no end; the second one for an end.
        signals.wait(None, Some(Instant::now() + SECOND_SIGNAL_TIME / 4))?;
        router.signal(Signal::SIGTERM);
        while Instant::now() < until && router.reap().is_none() {
            signals.wait(None, Some(until))?;
        }
        Ok(())
    }

    fn start_router(&mut self) -> Result<(), Failure> {
        let Tree {
            site,
            listener,
            spawner,
            ..
        } = *self.tree;
        let (control, theirs) = Control::pair()?;
        let files = [listener.as_fd(), theirs.as_fd()];
        let invocation = commands::router(site, files[0].as_raw_fd(), files[1].as_raw_fd());
        self.router = Some(spawner.spawn("router", &invocation, &files, Output::Logged)?);
        self.control = Some(control);
        self.router_at = None;
        Ok(())
    }

    fn next_deadline(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Draining { until, .. } | Phase::Ending { until, .. } => Some(until),
            Phase::Starting | Phase::Serving => None,
        };
        [phase, self.router_at, self.shards.deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    fn stop(&mut self, signal: Signal, now: Instant) {
        if self.asks.is_echo(signal, now) {
            return;
        }
        match &mut self.phase {
            Phase::Starting | Phase::Serving => {
                let grace = self
                    .tree
                    .site
                    .settings
                    .operation
                    .graceful_termination_timeout;
                self.tree.console.info(format!(
                    "{signal}: no new requests; open answers have {grace} s to finish; a second signal ends them at once"
                ));
                let grace = Duration::from_secs(u64::from(grace)) + ROUTER_STOP_TIME;
                self.phase = Phase::Draining {
                    until: now + grace,
                    failed: false,
                };
                self.router_at = None;
            }
            Phase::Draining { until, .. } | Phase::Ending { until, .. } => {
                self.tree
                    .console
                    .warn(format!("{signal} again: ending at once"));
                self.second_signal = Some(signal);
                *until = (*until).min(now + SECOND_SIGNAL_TIME);
            }
        }
        // The router ends open streams in order even at the second signal, if it is quick.
        if let Some(router) = &self.router {
            router.signal(Signal::SIGTERM);
        }
    }

    fn listen(&mut self, now: Instant) {
        let Some(control) = &mut self.control else {
            return;
        };
        let (messages, open) = control.read();
        if !open {
            self.control = None;
        }
        for message in messages {
            match message {
                Message::Ready => self.ready(),
                Message::ShardHung { epoch, reason } => self.abort_shards(epoch, &reason, now),
            }
        }
    }

    fn ready(&mut self) {
        self.router_policy.served();
        self.shard_policy.served();
        match self.phase {
            Phase::Starting => {
                self.phase = Phase::Serving;
                let seconds = self.tree.started.elapsed().as_secs_f64();
                let address = self
                    .tree
                    .listener
                    .local_addr()
                    .map_or_else(|_| String::new(), |address| address.to_string());
                self.tree.console.info(format!(
                    "Connected: ready on http://{address} after {seconds:.2} s"
                ));
            }
            Phase::Serving | Phase::Draining { .. } => self.tree.console.info("ready again"),
            Phase::Ending { .. } => {}
        }
    }

    fn abort_shards(&mut self, epoch: u64, reason: &str, now: Instant) {
        if self.shards.abort(now) {
            self.tree.console.warn(format!(
                "the shards hang in epoch {epoch} ({reason}); ending them"
            ));
        }
    }

    fn reap_shards(&mut self, now: Instant) -> Result<(), Failure> {
        for (process, how) in self.shards.reap() {
            // The first death is the cause; the others follow from it, and at the end all are wanted.
            if self.shards.is_falling() || matches!(self.phase, Phase::Ending { .. }) {
                continue;
            }
            self.report(&process, how);
            let wait = self.judge(how, Who::Shards, now)?;
            self.shards.fall(wait);
        }
        Ok(())
    }

    fn reap_router(&mut self, now: Instant) -> Result<(), Failure> {
        let Some(how) = self.router.as_mut().and_then(Process::reap) else {
            return Ok(());
        };
        let Some(process) = self.router.take() else {
            return Ok(());
        };
        self.control = None;
        match &mut self.phase {
            Phase::Draining { failed, .. } | Phase::Ending { failed, .. } => {
                *failed |= !how.is_success()
            }
            Phase::Starting | Phase::Serving => {
                self.report(&process, how);
                let wait = self.judge(how, Who::Router, now)?;
                self.router_at = Some(now + wait);
            }
        }
        Ok(())
    }

    /// How long to wait before starting again, or why there is no use in it.
    fn judge(&mut self, how: Ending, who: Who, now: Instant) -> Result<Duration, Failure> {
        if let (Phase::Starting, Some(code)) = (&self.phase, how.permanent()) {
            return Err(Failure::new(code, format!("{who} cannot start: see above")));
        }
        let policy = match who {
            Who::Shards => &mut self.shard_policy,
            Who::Router => &mut self.router_policy,
        };
        let wait = policy.died(now).ok_or_else(|| {
            let message = format!(
                "{who} died {} times within ten minutes; giving up",
                policy.deaths()
            );
            Failure::new(Code::RestartBudget, message)
        })?;
        self.tree.console.warn(format!(
            "starting {who} again in {:.1} s",
            wait.as_secs_f64()
        ));
        Ok(wait)
    }

    fn report(&self, process: &Process, how: Ending) {
        let lines = process.last_lines(REPORT_LINES);
        let name = process.name();
        self.tree.console.error(format!(
            "{name} (process {}) {}",
            process.id(),
            how.describe()
        ));
        for line in lines {
            self.tree.console.error(format!("  its last lines: {line}"));
        }
    }

    fn act_on_time(&mut self, now: Instant) -> Result<(), Failure> {
        // Shards are restarted during a drain too, or the answers that are open could not finish.
        if self.shards.act_on_time(now) && !matches!(self.phase, Phase::Ending { .. }) {
            self.shards.start(self.tree.site, self.tree.spawner)?;
        }
        if self.router_at.is_some_and(|at| at <= now) {
            self.start_router()?;
        }
        if let Phase::Draining { until, failed } = &mut self.phase {
            match &self.router {
                Some(router) if *until <= now => {
                    *failed = true;
                    router.signal(Signal::SIGKILL);
                    // Its end will be reaped; until then there is nothing more to do.
                    *until = now + ROUTER_STOP_TIME;
                }
                Some(_) => {}
                None => {
                    let failed = *failed;
                    self.shards.signal(Signal::SIGTERM);
                    let time = if self.second_signal.is_some() {
                        SECOND_SIGNAL_TIME
                    } else {
                        SHARD_STOP_TIME
                    };
                    self.phase = Phase::Ending {
                        until: now + time,
                        failed,
                    };
                }
            }
        }
        if let Phase::Ending { until, .. } = &mut self.phase
            && *until <= now
        {
            self.shards.signal(Signal::SIGKILL);
            *until = now + SHARD_STOP_TIME;
        }
        Ok(())
    }

    fn end(&self) -> Option<Result<End, Failure>> {
        let Phase::Ending { failed, .. } = self.phase else {
            return None;
        };
        if !self.shards.is_empty() {
            return None;
        }
        Some(match self.second_signal {
            Some(signal) => Ok(End::Interrupted(signal)),
            None if failed => Err(Failure::new(
                Code::Bug,
                "the router did not end in order; open answers were cut",
            )),
            None => Ok(End::Drained),
        })
    }
}

#[derive(Clone, Copy)]
enum Who {
    Shards,
    Router,
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Shards => "the shards",
            Self::Router => "the router",
        })
    }
}
