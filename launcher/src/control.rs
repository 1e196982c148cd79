//! What the router tells the launcher: one JSON object per line over a pair of sockets.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use serde::Deserialize;

use crate::failure::Failure;

/// A message of the router.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Message {
    /// Requests are answered.
    Ready,
    /// The shards make no progress though there is work.
    ShardHung { epoch: u64, reason: String },
}

/// The launcher's end.
pub struct Control {
    stream: UnixStream,
    buffer: Vec<u8>,
}

/// Longer lines are no messages of a router; the limit keeps a faulty one from filling memory.
const LINE_BYTES: usize = 64 * 1024;

impl Control {
    /// The launcher's end and the router's.
    pub fn pair() -> Result<(Self, UnixStream), Failure> {
        let failed = |error| Failure::system("no channel to the router", error);
        let (stream, theirs) = UnixStream::pair().map_err(failed)?;
        stream.set_nonblocking(true).map_err(failed)?;
        Ok((
            Self {
                stream,
                buffer: Vec::new(),
            },
            theirs,
        ))
    }

    /// The whole messages that have come, and whether more may follow. Events this launcher does not know are skipped.
    pub fn read(&mut self) -> (Vec<Message>, bool) {
        let mut chunk = [0; 4096];
        let open = loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => break false,
                Ok(count) => self.buffer.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break error.kind() == ErrorKind::WouldBlock,
            }
            if self.buffer.len() > LINE_BYTES {
                break true;
            }
        };
        let whole = self
            .buffer
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        let lines: Vec<u8> = self.buffer.drain(..whole).collect();
        if self.buffer.len() > LINE_BYTES {
            self.buffer.clear();
        }
        let messages = lines
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok());
        (messages.collect(), open)
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn messages_come_whole_and_unknown_ones_are_skipped() {
        let (mut control, mut router) = Control::pair().expect("a pair");
        assert_eq!(control.read(), (vec![], true));
        router
            .write_all(
                b"{\"event\":\"ready\"}\n{\"event\":\"new\"}\nnonsense\n{\"event\":\"shard_h",
            )
            .expect("written");
        assert_eq!(control.read(), (vec![Message::Ready], true));
        router
            .write_all(b"ung\",\"epoch\":3,\"reason\":\"no step\"}\n")
            .expect("written");
        drop(router);
        let hung = Message::ShardHung {
            epoch: 3,
            reason: "no step".into(),
        };
        assert_eq!(control.read(), (vec![hung], false));
    }

    #[test]
    fn a_line_without_end_is_dropped() {
        let (mut control, mut router) = Control::pair().expect("a pair");
        let writer = std::thread::spawn(move || {
            router
                .write_all(&vec![b'x'; 4 * LINE_BYTES])
                .map(|()| router)
        });
        while !writer.is_finished() {
            control.read();
            assert!(control.buffer.len() <= LINE_BYTES + 4096);
        }
    }
}
