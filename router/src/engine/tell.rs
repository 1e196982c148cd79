//! What handles hear: events of their requests, outcomes of their loads, and where things stand.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use kvrun_proto::{Outcome, Sampling};
use kvrun_scheduler::{Failure as Ended, Finish as Complete, Step, What};
use tokio::sync::mpsc;

use super::drive::{Driver, Link};
use super::meters::Meters;
use super::{Control, adapters, wire};
use crate::request::{Event, Failure, Finish, Image, TokenInfo};

/// How shards begin the error of a row whose image cannot be shown.
const BAD_IMAGE: &str = "bad_image: ";

/// An open request's way back to its client.
pub(super) struct Open {
    pub(super) events: mpsc::UnboundedSender<Event>,
    pub(super) sampling: Sampling,
    /// What an encoder reads.
    pub(super) source: Arc<[u32]>,
    /// Images of the prompt; they go to the shards with every admission.
    pub(super) images: Arc<[Image]>,
    /// Log-probabilities of the prompt so far; `None` once told, or when nobody asked.
    pub(super) prompt: Option<Vec<TokenInfo>>,
}

impl Driver {
    /// Log-probabilities of prompts come chunk by chunk and are told at once, before the first token.
    pub(super) fn keep_prompts(&mut self, outcome: &mut Outcome) {
        for row in &mut outcome.rows {
            if row.prompt.is_empty() {
                continue;
            }
            if let Some(Open {
                prompt: Some(kept), ..
            }) = self.open.get_mut(&row.sequence)
            {
                kept.extend(row.prompt.drain(..).map(wire::token));
            }
        }
    }

    /// Tells every request what happened to it; tokens are taken from the outcome that brought them.
    pub(super) fn deliver(&mut self, mut outcome: Option<Outcome>) {
        for event in self.scheduler.take_events() {
            let id = event.request;
            let Some(open) = self.open.get_mut(&id) else {
                continue;
            };
            // A send fails when the client just left; its cancellation is on the way.
            match event.what {
                What::Started {
                    queued,
                    cached_tokens,
                } => {
                    let _ = open.events.send(Event::Started {
                        queued,
                        cached_tokens,
                    });
                }
                What::Token { row, place } => {
                    let rows = outcome.as_mut().map(|outcome| &mut outcome.rows);
                    let Some(token) =
                        rows.and_then(|rows| rows.get_mut(row)?.tokens.get_mut(place))
                    else {
                        continue;
                    };
                    if let Some(prompt) = open.prompt.take() {
                        let _ = open.events.send(Event::Prompt(prompt));
                    }
                    let _ = open
                        .events
                        .send(Event::Token(wire::token(std::mem::take(token))));
                }
                What::Finished(finish) => {
                    let finish = match finish {
                        Complete::Length => Finish::Length,
                        Complete::EndToken => Finish::EndToken,
                    };
                    let _ = open.events.send(Event::Finished(finish));
                    self.open.remove(&id);
                }
                What::Failed(failure) => {
                    let _ = open
                        .events
                        .send(Event::Failed(self::failure(failure, &self.meters)));
                    self.open.remove(&id);
                }
            }
        }
    }

    /// Shows handles where things stand, and answers those who wait for that.
    pub(super) fn show(&mut self) {
        self.registry.mirror(&self.scheduler);
        self.answer_loads();
        let load = self.scheduler.load();
        self.meters.load(&load);
        let serving = matches!(self.link, Link::Serving(_));
        let adapters = self.scheduler.adapters();
        self.first_loads.retain(|&id| adapters.is_coming(id));
        let ready = serving && (*self.announce.borrow() || self.first_loads.is_empty());
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.waiting_since = (!self.open.is_empty()).then_some(self.progressed);
        let status = &mut shown.status;
        status.ready = ready;
        status.draining = self.draining;
        status.max_total_tokens = self.scheduler.limit().unwrap_or(0);
        status.queued = load.waiting;
        status.running = load.running;
        status.free_pages = load.pages.free;
        status.cached_pages = load.pages.cached;
        status.adapter_pages = load.pages.adapters;
        drop(shown);
        // Only once the status says so too: whoever waits for this may ask for it next.
        if ready && self.announced != self.last_epoch {
            self.announced = self.last_epoch;
            (self.options.control)(Control::Ready);
            self.announce.send_replace(true);
        }
        if self.open.is_empty() {
            self.drains.drain(..).for_each(|done| {
                let _ = done.send(());
            });
        }
    }

    pub(super) fn answer_loads(&mut self) {
        let adapters = self.scheduler.adapters();
        for (id, reply) in std::mem::take(&mut self.loads) {
            match (adapters::outcome(adapters.get(id)), self.registry.get(id)) {
                (Some(Ok(())), Some(info)) => drop(reply.send(Ok(info))),
                (Some(Err(error)), _) => drop(reply.send(Err(error))),
                _ => self.loads.push((id, reply)),
            }
        }
    }
}

/// A prompt that starts over has its log-probabilities computed anew.
pub(super) fn forget_half_prompts(step: &Step, open: &mut HashMap<u64, Open>) {
    for admission in &step.admit {
        if let Some(Open {
            prompt: Some(kept), ..
        }) = open.get_mut(&admission.sequence)
        {
            kept.clear();
        }
    }
}

impl Open {
    /// How it is sampled; what was told of its prompt is not computed again in a replay.
    pub(super) fn sampling(&self) -> Sampling {
        Sampling {
            prompt_logprobs: self.prompt.is_some(),
            ..self.sampling.clone()
        }
    }
}

/// Tokens that a step computes; `None` when it may look at images, as no count of tokens tells what that costs.
pub(super) fn size(step: &Step, open: &HashMap<u64, Open>) -> Option<u32> {
    let admitted = step.admit.iter().map(|admission| admission.sequence);
    let prompts = step.rows.iter().filter(|row| row.tokens > 1);
    let has_images = |id| open.get(&id).is_some_and(|open| !open.images.is_empty());
    if admitted
        .clone()
        .chain(prompts.map(|row| row.sequence))
        .any(has_images)
    {
        return None;
    }
    let sources = admitted.filter_map(|id| Some(open.get(&id)?.source.len() as u32));
    let rows = step.rows.iter().map(|row| row.tokens);
    Some(sources.chain(rows).sum())
}

pub(super) fn failure(ended: Ended, meters: &Meters) -> Failure {
    match ended {
        Ended::Row(text) => {
            meters.failed_rows.increment(1);
            match text.strip_prefix(BAD_IMAGE) {
                Some(reason) => Failure::Image(reason.to_owned()),
                None => Failure::Row(text),
            }
        }
        Ended::Deadline => Failure::Deadline,
        Ended::ShuttingDown => Failure::ShuttingDown,
        Ended::Adapter(text) => Failure::Adapter(text),
        Ended::Unavailable(text) => Failure::Unavailable(text),
        Ended::Deadly => {
            meters.deadly.increment(1);
            Failure::Deadly
        }
    }
}
