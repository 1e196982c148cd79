//! Admission to the queue: what can never be served is refused here, before it costs anything.

use crate::sequence::{Request, Sequence};
use crate::step::Refusal;
use crate::{AdapterId, Scheduler, Time, waiting};

impl Scheduler {
    /// Queues a request; answers with its id.
    pub fn submit(&mut self, now: Time, request: Request) -> Result<u64, Refusal> {
        self.check_size(&request)?;
        if let Some(remaining) = self.quarantine.remaining(now, request.fingerprint) {
            return Err(Refusal::Quarantined(remaining));
        }
        if request.adapter.is_some_and(|id| !self.adapters.accepts(id)) {
            return Err(Refusal::UnknownAdapter);
        }
        let tenant = self.fairness.open(&request.tenant, request.adapter);
        if !self.queue.has_room(tenant, request.tokens()) {
            self.fairness.close(tenant, request.adapter);
            return Err(Refusal::Overloaded(
                self.pace.retry_after(self.queue.tokens()),
            ));
        }
        if let Some(id) = request.adapter {
            self.adapters.open(id, now);
        }
        #[cfg(test)]
        let request = match self.planted {
            Some(crate::PlantedBug::KeyWithoutImages) => undigested(request),
            _ => request,
        };
        self.last_id += 1;
        let sequence = Sequence::new(request, tenant, now);
        if let Some(at) = sequence.expires() {
            self.deadlines.insert((at, self.last_id));
        }
        self.queue.push(waiting(self.last_id, &sequence));
        self.sequences.insert(self.last_id, sequence);
        Ok(self.last_id)
    }

    fn check_size(&self, request: &Request) -> Result<(), Refusal> {
        let limit = self.limit.ok_or(Refusal::NotReady)?;
        let asked = (request.prompt.len() as u64).saturating_add(u64::from(request.max_new_tokens));
        let asked = u32::try_from(asked).unwrap_or(u32::MAX);
        if asked > limit || request.prompt.is_empty() || request.max_new_tokens == 0 {
            return Err(Refusal::TooLong { asked, limit });
        }
        let (asked, limit) = self.pool_tokens(asked, request.memory_tokens, request.adapter);
        if asked > limit {
            return Err(Refusal::TooLong { asked, limit });
        }
        self.check_indivisible(request)
    }

    /// What a sequence of `tokens` tokens takes of the pool with its memory, and what the pool holds beside its adapter, as
    /// far as is known what that takes; both in tokens.
    pub(crate) fn pool_tokens(
        &self,
        tokens: u32,
        memory: u32,
        adapter: Option<AdapterId>,
    ) -> (u32, u32) {
        let width = self.model.page_tokens;
        let pages = tokens
            .div_ceil(width)
            .saturating_add(memory.div_ceil(width));
        let left = self.pool.saturating_sub(self.adapters.pages(adapter));
        (pages.saturating_mul(width), left.saturating_mul(width))
    }

    /// A step must hold all of a memory and a token of the prompt, and all of an image whose ids see each other.
    fn check_indivisible(&self, request: &Request) -> Result<(), Refusal> {
        let spans = request.images.iter().filter(|_| self.model.together);
        let largest = spans.map(|span| span.tokens).max().unwrap_or(0).max(1);
        let asked = request.memory_tokens.saturating_add(largest);
        match self.step_tokens {
            limit if asked > limit => Err(Refusal::Indivisible { asked, limit }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
fn undigested(mut request: Request) -> Request {
    let blank = |span: &crate::Span| crate::Span {
        digest: [0; 32],
        ..span.clone()
    };
    request.images = request.images.iter().map(blank).collect();
    request
}
