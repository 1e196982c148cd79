//! Signals as events: read from a file beside the others, instead of interrupting what runs.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::failure::Failure;

/// The signals that end the launcher, and the one that tells of a child's end.
pub struct Signals(SignalFd);

/// How soon a signal that comes again is still the same one. `timeout` and some shells send it to the process and to its
/// group; nobody who means it twice is as quick.
const ECHO: Duration = Duration::from_millis(50);

/// Tells a signal sent anew from one that arrived twice.
#[derive(Debug, Default)]
pub struct Asks(Option<(Signal, Instant)>);

impl Asks {
    /// Whether `signal` is the last one once more.
    pub fn is_echo(&mut self, signal: Signal, now: Instant) -> bool {
        let echo = self
            .0
            .is_some_and(|(last, at)| last == signal && now < at + ECHO);
        self.0 = Some((signal, now));
        echo
    }
}

/// Why [`Signals::wait`] returned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wake {
    /// Someone asks the launcher to end.
    pub stop: Option<Signal>,
    /// The other file can be read.
    pub readable: bool,
}

impl Signals {
    /// Takes the signals over. To be called before any thread is started, because threads inherit what is blocked.
    pub fn take_over() -> Result<Self, Failure> {
        let set: SigSet = [
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGQUIT,
            Signal::SIGCHLD,
        ]
        .into_iter()
        .collect();
        let failed = |error: Errno| Failure::system("signals cannot be taken over", error);
        set.thread_block().map_err(failed)?;
        SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map(Self)
            .map_err(failed)
    }

    /// Waits for a signal, for `other` to be readable, or until `deadline`.
    pub fn wait(
        &self,
        other: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> Result<Wake, Failure> {
        let mut files = vec![PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        files.extend(other.map(|file| PollFd::new(file, PollFlags::POLLIN)));
        match poll(&mut files, timeout(deadline)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Failure::system("waiting for processes", error)),
        }
        let mut wake = Wake {
            stop: None,
            readable: files.get(1).and_then(PollFd::any).unwrap_or(false),
        };
        while let Ok(Some(information)) = self.0.read_signal() {
            let signal = Signal::try_from(information.ssi_signo.cast_signed()).ok();
            wake.stop = wake
                .stop
                .or(signal.filter(|signal| *signal != Signal::SIGCHLD));
        }
        Ok(wake)
    }
}

fn timeout(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else {
        return PollTimeout::NONE;
    };
    // Rounded up, or the last millisecond before the deadline would be spent spinning.
    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_arrives_twice_at_once_was_sent_once() {
        let (mut asks, start) = (Asks::default(), Instant::now());
        let mut hear = |signal, ms| asks.is_echo(signal, start + Duration::from_millis(ms));
        assert!(!hear(Signal::SIGTERM, 0));
        assert!(hear(Signal::SIGTERM, 1));
        assert!(!hear(Signal::SIGINT, 2), "another one is meant");
        assert!(!hear(Signal::SIGINT, 60), "someone insists");
    }
}
