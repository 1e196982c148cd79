//! Worker threads that tokenize, so that one long prompt never stalls the server's event loop.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::tokenizer::{Encoded, Tokenizer};

/// A text was not tokenized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The text is so long in bytes that it cannot fit in tokens.
    #[error("the text has {bytes} bytes and at most {limit} can fit; shorten it")]
    TooLong {
        /// Bytes of the text.
        bytes: usize,
        /// Most bytes that are looked at.
        limit: usize,
    },
    /// All workers are busy, and their queue is full or did not move for the time limit.
    #[error("too many texts wait to be tokenized; retry shortly")]
    Busy,
    /// The tokenizer did not get through the text in time.
    #[error("the text takes longer than {} s to tokenize; shorten it or break up its long runs", limit.as_secs_f64())]
    TooSlow {
        /// The time it was given.
        limit: Duration,
    },
    /// The tokenizer has no encoding for the text.
    #[error("the text cannot be tokenized: {0}")]
    Unfit(String),
}

struct Job {
    text: String,
    add_special: bool,
    /// Told when a worker takes it up.
    begun: oneshot::Sender<()>,
    reply: oneshot::Sender<Result<Encoded, String>>,
}

/// Tokenizes on its own threads, with a bounded queue. Cheap to clone; the threads end with the last clone.
#[derive(Clone)]
pub struct TokenizerPool {
    tokenizer: Arc<Tokenizer>,
    jobs: SyncSender<Job>,
    limit: Duration,
}

impl TokenizerPool {
    /// Starts `workers` threads (at least one) that take up to `queue` waiting texts, each of which may wait for `limit`
    /// and then be worked on for `limit`.
    pub fn start(
        tokenizer: Tokenizer,
        workers: usize,
        queue: usize,
        limit: Duration,
    ) -> std::io::Result<Self> {
        let tokenizer = Arc::new(tokenizer);
        let (jobs, waiting) = sync_channel(queue.max(1));
        let waiting = Arc::new(Mutex::new(waiting));
        for number in 0..workers.max(1) {
            let (tokenizer, waiting) = (tokenizer.clone(), waiting.clone());
            std::thread::Builder::new()
                .name(format!("tokenize-{number}"))
                .spawn(move || work(&tokenizer, &waiting))?;
        }
        Ok(Self {
            tokenizer,
            jobs,
            limit,
        })
    }

    /// The tokenizer itself, for the cheap direction: ids to text.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Tokenizes `text`; more than `byte_limit` bytes are refused unread.
    ///
    /// A tokenizer cannot be interrupted: at the time limit the caller is answered, and the worker comes back when it is
    /// through, which the byte limit bounds.
    pub async fn encode(
        &self,
        text: String,
        add_special: bool,
        byte_limit: usize,
    ) -> Result<Encoded, EncodeError> {
        if text.len() > byte_limit {
            return Err(EncodeError::TooLong {
                bytes: text.len(),
                limit: byte_limit,
            });
        }
        let (begun, taken_up) = oneshot::channel();
        let (reply, answer) = oneshot::channel();
        let job = Job {
            text,
            add_special,
            begun,
            reply,
        };
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => EncodeError::Busy,
            TrySendError::Disconnected(_) => {
                EncodeError::Unfit("no tokenizer thread is left".into())
            }
        })?;
        let limit = self.limit;
        // A worker that vanished shows in the answer.
        let _ = timeout(limit, taken_up)
            .await
            .map_err(|_| EncodeError::Busy)?;
        let late = |_| EncodeError::TooSlow { limit };
        match timeout(limit, answer).await.map_err(late)? {
            Ok(encoded) => encoded.map_err(EncodeError::Unfit),
            Err(_) => Err(EncodeError::Unfit("the tokenizer gave up on it".into())),
        }
    }
}

fn work(tokenizer: &Tokenizer, waiting: &Mutex<Receiver<Job>>) {
    loop {
        let job = waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok(job) = job else { return };
        // Nobody waits any more: the client left while its text was queued.
        if job.reply.is_closed() {
            continue;
        }
        let _ = job.begun.send(());
        // A tokenizer that panics on one text must not take the thread, and with it every later text, along.
        let encoded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            tokenizer.encode(&job.text, job.add_special)
        }));
        let _ = job
            .reply
            .send(encoded.unwrap_or_else(|_| Err("the tokenizer failed on it".into())));
    }
}
