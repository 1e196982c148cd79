//! What handles ask for: requests, cancels, adapters, the end.

use std::time::Instant;

use kvrun_scheduler::{AdapterId, Failure as Ended, Refusal as Refused, Span};
use tokio::sync::mpsc;

use super::drive::{Driver, LoadReply};
use super::tell::Open;
use super::{Admitted, Command};
use crate::request::{
    AdapterInfo, AdapterSpec, AdapterState, Image, LoadError, Refusal, UnknownAdapter, ValidRequest,
};

impl Driver {
    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(request, fingerprint, reply) => {
                let answer = self.submit(*request, fingerprint);
                // Whoever left before admission wants nothing computed.
                if let Err(Ok(admitted)) = reply.send(answer) {
                    self.cancel(admitted.id);
                }
            }
            Command::Cancel(id) => self.cancel(id),
            Command::Load(spec, reply) => self.load(spec, reply),
            Command::Unload(name, reply) => {
                let _ = reply.send(self.unload(name));
            }
            Command::Pin(id, pinned) => {
                self.scheduler.adapters_mut().pin(id, pinned);
            }
            Command::Drain(done) => {
                self.draining = true;
                self.drains.push(done);
            }
            Command::Abort => self.scheduler.fail_all(self.now(), &Ended::ShuttingDown),
        }
    }

    pub(super) fn submit(
        &mut self,
        request: ValidRequest,
        fingerprint: u64,
    ) -> Result<Admitted, Refusal> {
        if self.draining {
            return Err(Refusal::Draining);
        }
        let name = |id| {
            self.registry
                .get(id)
                .map_or_else(String::new, |info| info.name)
        };
        let adapter = request.adapter;
        let asked = kvrun_scheduler::Request {
            prompt: request.prompt,
            adapter,
            max_new_tokens: request.max_new_tokens,
            end_tokens: request.end_tokens,
            tenant: request.tenant,
            deadline: request
                .deadline
                .map(|at| at.saturating_duration_since(self.origin)),
            reuse_prefix: request.reuse_prefix,
            fingerprint,
            memory_tokens: request.memory_tokens,
            images: request.images.iter().map(span).collect(),
            payload: request
                .images
                .iter()
                .map(|image| image.data.len() as u64)
                .sum(),
        };
        let id = self
            .scheduler
            .submit(self.now(), asked)
            .map_err(|refused| match refused {
                Refused::Overloaded(retry_after) => Refusal::Overloaded { retry_after },
                Refused::Quarantined(remaining) => Refusal::Quarantined { remaining },
                Refused::TooLong { asked, limit } => Refusal::TooLong { asked, limit },
                Refused::Indivisible { asked, limit } => Refusal::Indivisible { asked, limit },
                Refused::UnknownAdapter => {
                    Refusal::UnknownAdapter(adapter.map_or_else(String::new, name))
                }
                Refused::NotReady => Refusal::NotReady,
            })?;
        if self.open.is_empty() {
            // Silence before new work is no stall.
            self.progressed = Instant::now();
        }
        let (sender, events) = mpsc::unbounded_channel();
        let prompt = request.sampling.prompt_logprobs.then(Vec::new);
        let sampling = request.sampling;
        self.open.insert(
            id,
            Open {
                events: sender,
                sampling,
                source: request.source,
                images: request.images,
                prompt,
            },
        );
        Ok(Admitted { id, events })
    }

    pub(super) fn cancel(&mut self, id: u64) {
        self.open.remove(&id);
        self.scheduler.cancel(self.now(), id);
    }

    pub(super) fn register(&mut self, spec: AdapterSpec) -> AdapterId {
        let now = self.now();
        let id = self.scheduler.adapters_mut().register(0, spec.pinned, now);
        self.registry.add(id, spec);
        id
    }

    pub(super) fn load(&mut self, spec: AdapterSpec, reply: LoadReply) {
        let id = match self.registry.named(&spec.name) {
            Some(old) if old.state == AdapterState::Failed => {
                self.scheduler.adapters_mut().leave(old.id);
                self.register(spec)
            }
            Some(old) if old.path != spec.path => {
                let _ = reply.send(Err(LoadError::Taken { name: spec.name }));
                return;
            }
            Some(old) => {
                let adapters = self.scheduler.adapters_mut();
                adapters.pin(old.id, spec.pinned || old.pinned);
                adapters.want(old.id);
                old.id
            }
            None => self.register(spec),
        };
        self.loads.push((id, reply));
    }

    pub(super) fn unload(&mut self, name: String) -> Result<AdapterInfo, UnknownAdapter> {
        let Some(info) = self.registry.withdraw(&name) else {
            return Err(UnknownAdapter(name));
        };
        self.scheduler.adapters_mut().leave(info.id);
        let view = self.scheduler.adapters().get(info.id);
        let users = view.map_or(0, |view| view.users);
        let state = if users > 0 {
            AdapterState::Draining
        } else {
            AdapterState::Gone
        };
        Ok(AdapterInfo {
            users,
            state,
            ..info
        })
    }
}

/// What the scheduler knows of an image.
fn span(image: &Image) -> Span {
    Span {
        start: image.at,
        tokens: image.tokens,
        digest: image.digest,
    }
}
