//! One answer on its way from the engine to a client: tokens become text, stop strings end it, times are kept.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvrun_text::{Detokenizer, StopMatcher, Tokenizer};
use metrics::{counter, histogram};
use tokio::sync::OwnedSemaphorePermit;

use super::App;
use super::error::{ApiError, Kind};
use super::request::Caller;
use super::validate::{AdapterMark, Checked};
use crate::engine::Answer;
use crate::metrics as names;
use crate::request::{Event, Finish, TokenInfo};

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// As many tokens as asked for.
    Length,
    /// The model ended it.
    EndToken,
    /// A stop string ended it.
    StopText,
}

/// A token and the text that came with it.
#[derive(Debug, Clone, PartialEq)]
pub struct TextToken {
    /// The token.
    pub info: TokenInfo,
    /// The text it set free. Joined over all tokens that are not special, this is the answer.
    pub text: String,
    /// Whether it is a control token; then `text` is its name and no part of the answer.
    pub special: bool,
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Log-probabilities of the prompt after its first token.
    Prompt(Vec<TokenInfo>),
    /// The next token.
    Token(TextToken),
    /// The last token, and why it is the last.
    Last(TextToken, EndReason),
}

/// Times and sizes of an answer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Tokens so far.
    pub generated: u32,
    /// Prompt tokens that came from the prefix cache.
    pub cached: u32,
    /// From arrival to admission.
    pub validation: Duration,
    /// From admission to the first row.
    pub queue: Duration,
    /// From arrival until now, or until the end.
    pub total: Duration,
}

impl Figures {
    /// From the first row until now, or until the end.
    pub fn inference(&self) -> Duration {
        self.total
            .saturating_sub(self.validation)
            .saturating_sub(self.queue)
    }

    /// Inference time per token.
    pub fn per_token(&self) -> Duration {
        self.inference() / self.generated.max(1)
    }
}

/// An admitted request. Dropping it cancels the rest.
pub struct Generation {
    answer: Option<Answer>,
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    end_tokens: Arc<[u32]>,
    max_new_tokens: u32,
    /// Tokens kept back because the text of the last ordinary one may still grow, or because the last may be the end.
    pending: Vec<TextToken>,
    /// Room among the concurrent requests, given back with the answer.
    _permit: OwnedSemaphorePermit,
    app: App,
    ready: VecDeque<Part>,
    failed: Option<ApiError>,
    method: &'static str,
    adapter_label: String,
    request_id: Arc<str>,
    arrived: Instant,
    last_token: Option<Instant>,
    /// The adapter it runs with.
    pub adapter: Option<AdapterMark>,
    /// The seed, when chance plays a part.
    pub seed: Option<u64>,
    /// Tokens of the prompt.
    pub prompt: Arc<[u32]>,
    /// Times and sizes so far.
    pub figures: Figures,
}

impl Generation {
    /// Hands a checked request to the engine; `Ok` once it is in the queue.
    pub async fn submit(
        app: &App,
        caller: &Caller,
        checked: &Checked,
        permit: OwnedSemaphorePermit,
        method: &'static str,
    ) -> Result<Self, ApiError> {
        let request = checked.request.clone();
        histogram!(names::INPUT_LENGTH).record(request.input().len() as f64);
        histogram!(names::MAX_NEW_TOKENS).record(request.max_new_tokens);
        let (prompt, end_tokens, max_new_tokens) = (
            request.input().clone(),
            request.end_tokens.clone(),
            request.max_new_tokens,
        );
        let seed = checked.is_sampled().then_some(request.sampling.seed);
        let validation = caller.arrived.elapsed();
        let answer = app.engine.submit(request).await?;
        let tokenizer = app.text.tokenizer().clone();
        Ok(Self {
            answer: Some(answer),
            detokenizer: Detokenizer::new(tokenizer.clone()),
            tokenizer,
            stop: match checked.keep_stop {
                true => StopMatcher::keeping(&checked.stop),
                false => StopMatcher::new(&checked.stop),
            },
            end_tokens,
            max_new_tokens,
            pending: Vec::new(),
            _permit: permit,
            app: app.clone(),
            ready: VecDeque::new(),
            failed: None,
            method,
            adapter_label: names::adapter_label(
                checked
                    .adapter
                    .as_ref()
                    .map(|adapter| adapter.name.as_str()),
            ),
            request_id: caller.request_id.clone(),
            arrived: caller.arrived,
            last_token: None,
            adapter: checked.adapter.clone(),
            seed,
            prompt,
            figures: Figures {
                validation,
                ..Figures::default()
            },
        })
    }

    /// The next part; `None` after [`Part::Last`]. An error is terminal as well.
    pub async fn next(&mut self) -> Result<Option<Part>, ApiError> {
        loop {
            if let Some(part) = self.ready.pop_front() {
                return Ok(Some(part));
            }
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            if !self.hear().await {
                return Ok(None);
            }
        }
    }

    /// Waits for the first token: pixels are read by the shards, so that only then is it known that they can be.
    pub async fn first(&mut self) -> Result<(), ApiError> {
        while self.figures.generated == 0 && self.failed.is_none() && self.hear().await {}
        match self.failed.take_if(|_| self.figures.generated == 0) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Takes in the next event; false when none follows.
    async fn hear(&mut self) -> bool {
        let Some(answer) = self.answer.as_mut() else {
            return false;
        };
        match answer.next().await {
            Some(Event::Started {
                queued,
                cached_tokens,
            }) => {
                self.figures.queue = queued;
                self.figures.cached = cached_tokens;
                counter!(names::PREFIX_HIT_TOKENS).increment(u64::from(cached_tokens));
            }
            Some(Event::Prompt(tokens)) => self.ready.push_back(Part::Prompt(tokens)),
            Some(Event::Token(token)) => self.take(token),
            Some(Event::Finished(finish)) => self.finish(finish),
            Some(Event::Failed(failure)) => self.fail(failure.into()),
            None => {
                counter!(names::STREAMS_WITHOUT_TERMINAL).increment(1);
                self.fail(ApiError::new(
                    Kind::Incomplete,
                    "the answer broke off; send the request again",
                ));
            }
        }
        true
    }

    fn take(&mut self, info: TokenInfo) {
        self.observe();
        if self.end_tokens.contains(&info.id) {
            // The end token has no text, so what earlier tokens hold back must come out with them.
            let (text, stopped) = self.rest_of_text();
            self.amend_pending(&text);
            if stopped {
                return self.end(EndReason::StopText);
            }
            self.release_pending();
            let text = self.tokenizer.token_text(info.id);
            // Even where the tokenizer takes it for text: an end token is never part of the answer.
            self.pending.push(TextToken {
                info,
                text,
                special: true,
            });
            return;
        }
        if self.tokenizer.is_special(info.id) {
            let text = self.tokenizer.token_text(info.id);
            self.pending.push(TextToken {
                info,
                text,
                special: true,
            });
        } else {
            self.release_pending();
            let delta = self.detokenizer.push(info.id);
            let pushed = self.stop.push(&delta);
            self.pending.push(TextToken {
                info,
                text: pushed.text,
                special: false,
            });
            if pushed.stopped.is_some() {
                return self.end(EndReason::StopText);
            }
        }
        let may_grow = self.detokenizer.holds() || self.stop.holds();
        if !may_grow && self.figures.generated < self.max_new_tokens {
            self.release_pending();
        }
    }

    fn finish(&mut self, finish: Finish) {
        let (text, stopped) = self.rest_of_text();
        self.amend_pending(&text);
        self.end(match finish {
            _ if stopped => EndReason::StopText,
            Finish::Length => EndReason::Length,
            Finish::EndToken => EndReason::EndToken,
        });
    }

    /// Everything still held back, now that nothing can change it, and whether a stop string was in it.
    fn rest_of_text(&mut self) -> (String, bool) {
        let held = self.detokenizer.flush();
        let pushed = self.stop.push(&held);
        match pushed.stopped {
            Some(_) => (pushed.text, true),
            None => (pushed.text + &self.stop.flush(), false),
        }
    }

    fn amend_pending(&mut self, text: &str) {
        if let Some(token) = self.pending.iter_mut().rfind(|token| !token.special) {
            token.text.push_str(text);
        }
    }

    fn release_pending(&mut self) {
        self.ready.extend(self.pending.drain(..).map(Part::Token));
    }

    fn end(&mut self, reason: EndReason) {
        // Dropped here, the engine frees pages and permit before the client has read the last event.
        self.answer = None;
        self.figures.total = self.arrived.elapsed();
        self.app.pace.record(self.figures.total);
        let last = self.pending.pop();
        self.release_pending();
        match last {
            Some(token) => self.ready.push_back(Part::Last(token, reason)),
            None => {
                self.failed = Some(ApiError::new(
                    Kind::Incomplete,
                    "the answer ended without a token",
                ))
            }
        }
        tracing::info!(
            request_id = &*self.request_id,
            method = self.method,
            adapter = self.adapter_label,
            prompt_tokens = self.prompt.len(),
            generated_tokens = self.figures.generated,
            cached_tokens = self.figures.cached,
            queue_ms = self.figures.queue.as_millis() as u64,
            total_ms = self.figures.total.as_millis() as u64,
            "answered"
        );
        names::record_answer(
            self.method,
            names::AnswerFigures {
                total: self.figures.total.as_secs_f64(),
                validation: self.figures.validation.as_secs_f64(),
                queue: self.figures.queue.as_secs_f64(),
                inference: self.figures.inference().as_secs_f64(),
                generated: self.figures.generated,
            },
        );
    }

    fn fail(&mut self, error: ApiError) {
        self.answer = None;
        self.release_pending();
        self.failed = Some(error);
    }

    fn observe(&mut self) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => histogram!(names::TTFT, "adapter" => self.adapter_label.clone())
                .record(now.duration_since(self.arrived).as_secs_f64()),
            Some(last) => histogram!(names::INTER_TOKEN, "adapter" => self.adapter_label.clone())
                .record(now.duration_since(last).as_secs_f64()),
        }
        self.figures.generated += 1;
        self.figures.total = now.duration_since(self.arrived);
    }
}
