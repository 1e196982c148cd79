//! Keeps a server under load: callers that wait for their answers, or requests at random moments.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinSet;

use crate::args::Args;
use crate::client::{Failed, Server};
use crate::prompts::{Prompts, arrival};
use crate::stats::{Figures, Sample, summarize};

/// Lengths, in words, of the two texts by which the server's tokenizer is measured.
const SHORT: usize = 20;
const LONG: usize = 220;

/// What happens while the load runs.
#[derive(Debug, Clone)]
pub enum Update {
    /// A measurement begins: simultaneous requests, and how many in all.
    Started { batch_size: u32, requests: u64 },
    /// An event with tokens came.
    Tokens,
    /// A request ended, well or not.
    Ended { good: bool },
    /// A measurement is done.
    Measured(Box<Figures>),
}

/// Measures at every batch size, one after the other.
pub async fn run(args: &Args, updates: &UnboundedSender<Update>) -> Result<Vec<Figures>, Failed> {
    let server = Server::new(args);
    server.reach().await?;
    let prompts = fit_prompts(&server, args).await;
    let load = Load {
        server,
        prompts,
        adapters: args.adapters.clone(),
        next: Arc::new(AtomicU64::new(0)),
        updates: updates.clone(),
    };
    let mut all = Vec::new();
    for &batch_size in &args.batch_size {
        let _quiet = load
            .callers(batch_size, args.warmups, Instant::now(), false)
            .await;
        let requests = u64::from(batch_size) * u64::from(args.runs);
        let _closed = updates.send(Update::Started {
            batch_size,
            requests,
        });
        let start = Instant::now();
        let outcomes = match args.rate {
            Some(rate) => load.arrivals(batch_size, requests, rate, args.seed).await,
            None => load.callers(batch_size, args.runs, start, true).await,
        };
        let (samples, failures): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        let samples: Vec<Sample> = samples.into_iter().flatten().collect();
        let failures: Vec<String> = failures
            .into_iter()
            .filter_map(Result::err)
            .map(|failed| failed.0)
            .collect();
        let figures = summarize(batch_size, &samples, &failures);
        let _closed = updates.send(Update::Measured(Box::new(figures.clone())));
        all.push(figures);
    }
    Ok(all)
}

async fn fit_prompts(server: &Server, args: &Args) -> Prompts {
    let count = async |words| {
        server
            .count(&Prompts::of_words(words, args.seed).prompt(0))
            .await
    };
    match (count(SHORT).await, count(LONG).await) {
        (Some(short), Some(long)) => Prompts::of_tokens(
            args.sequence_length,
            args.seed,
            (SHORT, short),
            (LONG, long),
        ),
        // A server that does not say is asked with one word per token, which common words mostly are.
        _ => Prompts::of_words(args.sequence_length as usize, args.seed),
    }
}

type Outcome = Result<Sample, Failed>;

#[derive(Clone)]
struct Load {
    server: Server,
    prompts: Prompts,
    adapters: Vec<String>,
    next: Arc<AtomicU64>,
    updates: UnboundedSender<Update>,
}

impl Load {
    /// Closed loop: each caller asks again as soon as it is answered.
    async fn callers(
        &self,
        batch_size: u32,
        runs: u32,
        start: Instant,
        shown: bool,
    ) -> Vec<Outcome> {
        let mut callers = JoinSet::new();
        for _ in 0..batch_size {
            let load = self.clone();
            callers.spawn(async move {
                let mut outcomes = Vec::new();
                for _ in 0..runs {
                    outcomes.push(load.ask(start, shown).await);
                }
                outcomes
            });
        }
        callers.join_all().await.into_iter().flatten().collect()
    }

    /// Open loop: requests come at random moments. At the bound, one more waits, and its wait counts.
    async fn arrivals(&self, batch_size: u32, requests: u64, rate: f64, seed: u64) -> Vec<Outcome> {
        let places = Arc::new(Semaphore::new(batch_size as usize));
        let (mut asked, mut random) = (JoinSet::new(), StdRng::seed_from_u64(seed));
        let (start, mut due) = (Instant::now(), 0.0);
        for _ in 0..requests {
            due += arrival(&mut random, rate);
            tokio::time::sleep_until((start + Duration::from_secs_f64(due)).into()).await;
            let (load, places, came) = (self.clone(), Arc::clone(&places), start.elapsed());
            asked.spawn(async move {
                let _place = places.acquire().await;
                let outcome = load.ask(start, true).await;
                outcome.map(|sample| Sample {
                    sent: came,
                    ..sample
                })
            });
        }
        asked.join_all().await
    }

    async fn ask(&self, start: Instant, shown: bool) -> Outcome {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let adapter = (!self.adapters.is_empty())
            .then(|| self.adapters[number as usize % self.adapters.len()].as_str());
        let adapter = adapter.filter(|name| *name != "base");
        let tell = |update| {
            if shown {
                let _closed = self.updates.send(update);
            }
        };
        let prompt = self.prompts.prompt(number);
        let outcome = self
            .server
            .ask(&prompt, adapter, start, || tell(Update::Tokens))
            .await;
        tell(Update::Ended {
            good: outcome.is_ok(),
        });
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use clap::Parser;
    use serde_json::Value;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    /// A server that counts one token a word and one more, and answers three tokens 20 ms apart; the adapter `bad` is
    /// refused.
    #[derive(Clone, Default)]
    struct Stand {
        asked: Arc<Mutex<Vec<Value>>>,
        answering: Arc<AtomicU64>,
        /// The most that it answered at a time.
        beside: Arc<AtomicU64>,
    }

    impl Stand {
        async fn listen(&self) -> String {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("an address");
            let stand = self.clone();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(stand.clone().answer(stream));
                }
            });
            format!("http://{address}")
        }

        async fn answer(self, mut stream: TcpStream) {
            let (route, body) = read_request(&mut stream).await;
            let mut say =
                async |text: String| stream.write_all(text.as_bytes()).await.expect("written");
            let whole = |status: &str, body: String| {
                format!(
                    "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                )
            };
            if route.ends_with("/tokenize") {
                let words = body["inputs"].as_str().expect("inputs").split(' ').count();
                return say(whole("200 OK", Value::from(vec![0; words + 1]).to_string())).await;
            }
            if !route.ends_with("/generate_stream") {
                return say(whole("200 OK", String::new())).await;
            }
            self.asked.lock().expect("a list").push(body.clone());
            if body["parameters"]["adapter_id"] == "bad" {
                let error = r#"{"error":"no adapter bad","error_type":"not_found"}"#;
                return say(whole("404 Not Found", error.to_owned())).await;
            }
            say(
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n"
                    .to_owned(),
            )
            .await;
            let answering = self.answering.fetch_add(1, Ordering::SeqCst) + 1;
            self.beside.fetch_max(answering, Ordering::SeqCst);
            for details in ["null", "null", r#"{"generated_tokens":3,"input_length":9}"#] {
                tokio::time::sleep(Duration::from_millis(20)).await;
                say(format!(
                    "data:{{\"token\":{{\"id\":1}},\"details\":{details}}}\n\n"
                ))
                .await;
            }
            self.answering.fetch_sub(1, Ordering::SeqCst);
        }
    }

    async fn read_request(stream: &mut TcpStream) -> (String, Value) {
        let mut bytes = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|line| {
                    line.to_lowercase()
                        .strip_prefix("content-length:")?
                        .trim()
                        .parse()
                        .ok()
                });
                if body.len() >= length.unwrap_or(0usize) {
                    let route = head.split(' ').nth(1).expect("a route").to_owned();
                    return (route, serde_json::from_str(body).unwrap_or_default());
                }
            }
            assert!(stream.read_buf(&mut bytes).await.expect("bytes") > 0);
        }
    }

    async fn measured(stand: &Stand, flags: &[&str]) -> Vec<Figures> {
        let url = stand.listen().await;
        let args =
            Args::parse_from([&["text-generation-benchmark", "--url", &url], flags].concat());
        run(&args, &unbounded_channel().0).await.expect("figures")
    }

    #[tokio::test]
    async fn callers_wait_for_their_answers() {
        let stand = Stand::default();
        let flags = [
            "--batch-size",
            "1,3",
            "--runs",
            "2",
            "--warmups",
            "1",
            "--sequence-length",
            "9",
        ];
        let figures = measured(&stand, &flags).await;
        let facts: Vec<_> = figures
            .iter()
            .map(|one| (one.batch_size, one.requests, one.tokens, one.prompt_tokens))
            .collect();
        assert_eq!(facts, [(1, 2, 6, 18), (3, 6, 18, 54)]);
        for one in &figures {
            assert!(
                one.first_token.low >= 19.0 && one.between_tokens.p50 >= 15.0,
                "{one:?}"
            );
        }
        let prompts: Vec<_> = stand
            .asked
            .lock()
            .expect("a list")
            .iter()
            .map(|body| body["inputs"].to_string())
            .collect();
        assert_eq!(prompts.len(), 12);
        assert!(
            prompts.iter().all(|prompt| prompt.split(' ').count() == 8),
            "{prompts:?}"
        );
        assert_eq!(
            prompts
                .iter()
                .collect::<std::collections::HashSet<_>>()
                .len(),
            12
        );
    }

    #[tokio::test]
    async fn adapters_take_turns_and_a_refused_one_is_a_failure() {
        let stand = Stand::default();
        let flags = [
            "--batch-size",
            "1",
            "--runs",
            "6",
            "--warmups",
            "0",
            "--adapters",
            "a,base,bad",
        ];
        let figures = measured(&stand, &flags).await;
        assert_eq!((figures[0].requests, figures[0].failures), (4, 2));
        let reason = figures[0].reason.as_deref().expect("a reason");
        assert!(
            reason.contains("404") && reason.contains("no adapter bad"),
            "{reason}"
        );
        let mut turns = BTreeMap::new();
        for body in stand.asked.lock().expect("a list").iter() {
            *turns
                .entry(body["parameters"]["adapter_id"].to_string())
                .or_insert(0) += 1;
        }
        assert_eq!(turns.into_values().collect::<Vec<_>>(), [2, 2, 2]);
    }

    #[tokio::test]
    async fn requests_at_random_moments_do_not_wait_for_each_other() {
        let stand = Stand::default();
        let figures = measured(
            &stand,
            &[
                "--batch-size",
                "40",
                "--runs",
                "1",
                "--warmups",
                "0",
                "--rate",
                "1000",
            ],
        )
        .await;
        assert_eq!(figures[0].requests, 40);
        assert!(stand.beside.load(Ordering::SeqCst) > 1);
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_said_so() {
        let args = Args::parse_from(["text-generation-benchmark", "--url", "http://127.0.0.1:9"]);
        let failed = run(&args, &unbounded_channel().0)
            .await
            .expect_err("nothing listens");
        assert!(failed.0.contains("refused"), "{failed}");
    }
}
