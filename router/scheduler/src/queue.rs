//! Requests that wait for their first or next row, one lane per tenant and adapter, and the bounds on them.

use crate::fairness::Fairness;
use crate::{AdapterId, Time};
use std::collections::BTreeMap;

/// A lane: requests of one tenant for one adapter, in the order of their admission.
type Lane = BTreeMap<u64, Time>;

/// How much may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Most requests.
    pub requests: u32,
    /// Most tokens, prompts and asked-for answers together.
    pub tokens: u64,
}

/// The waiting requests.
#[derive(Debug)]
pub struct Queue {
    limits: QueueLimits,
    lanes: BTreeMap<(u32, Option<AdapterId>), Lane>,
    /// Requests and tokens of each tenant that waits.
    tenants: BTreeMap<u32, (u32, u64)>,
    requests: u32,
    tokens: u64,
}

/// One waiting request, as the queue sees it.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    /// The request.
    pub id: u64,
    /// Its tenant.
    pub tenant: u32,
    /// Its adapter.
    pub adapter: Option<AdapterId>,
    /// Tokens it counts for.
    pub tokens: u64,
    /// When it was admitted.
    pub submitted: Time,
}

impl Queue {
    /// An empty queue.
    pub fn new(limits: QueueLimits) -> Self {
        Self {
            limits,
            lanes: BTreeMap::new(),
            tenants: BTreeMap::new(),
            requests: 0,
            tokens: 0,
        }
    }

    /// Changes the bounds; what waits already stays.
    pub fn set_limits(&mut self, limits: QueueLimits) {
        self.limits = limits;
    }

    /// Whether one more request fits. While others wait, one tenant may fill half of the queue at most.
    pub fn has_room(&self, tenant: u32, tokens: u64) -> bool {
        let (mine, my_tokens) = self.tenants.get(&tenant).copied().unwrap_or_default();
        let others_wait = self.requests > mine;
        let part = if others_wait { 2 } else { 1 };
        self.requests < self.limits.requests
            && self.tokens.saturating_add(tokens) <= self.limits.tokens
            && mine < self.limits.requests.div_ceil(part)
            && my_tokens.saturating_add(tokens) <= self.limits.tokens.div_ceil(part.into())
    }

    /// Adds a request; replayed and preempted ones come back here and keep their place by their age.
    pub fn push(&mut self, waiting: Waiting) {
        let lane = self
            .lanes
            .entry((waiting.tenant, waiting.adapter))
            .or_default();
        lane.insert(waiting.id, waiting.submitted);
        let (requests, tokens) = self.tenants.entry(waiting.tenant).or_default();
        (*requests, *tokens) = (*requests + 1, *tokens + waiting.tokens);
        self.requests += 1;
        self.tokens += waiting.tokens;
    }

    /// Takes a request out.
    pub fn remove(&mut self, waiting: Waiting) {
        let place = (waiting.tenant, waiting.adapter);
        let Some(lane) = self.lanes.get_mut(&place) else {
            return;
        };
        if lane.remove(&waiting.id).is_none() {
            return;
        }
        if lane.is_empty() {
            self.lanes.remove(&place);
        }
        self.requests -= 1;
        self.tokens -= waiting.tokens;
        if let Some((requests, tokens)) = self.tenants.get_mut(&waiting.tenant) {
            (*requests, *tokens) = (*requests - 1, *tokens - waiting.tokens);
            if *requests == 0 {
                self.tenants.remove(&waiting.tenant);
            }
        }
    }

    /// The request that is next by fairness among the lanes whose adapter is usable.
    pub fn next(
        &self,
        fairness: &Fairness,
        now: Time,
        usable: impl Fn(Option<AdapterId>) -> bool,
    ) -> Option<u64> {
        self.lanes
            .iter()
            .filter(|((_, adapter), _)| usable(*adapter))
            .filter_map(|(&(tenant, adapter), lane)| {
                let (&id, &since) = lane.first_key_value()?;
                Some((
                    fairness.rank(tenant, adapter, now.saturating_sub(since)),
                    id,
                ))
            })
            .min()
            .map(|(_, id)| id)
    }

    /// Since when the oldest request for each adapter waits.
    pub fn oldest_by_adapter(&self) -> BTreeMap<AdapterId, Time> {
        let mut oldest = BTreeMap::new();
        for ((_, adapter), lane) in &self.lanes {
            if let (Some(adapter), Some((_, &since))) = (adapter, lane.first_key_value()) {
                let first = oldest.entry(*adapter).or_insert(since);
                *first = since.min(*first);
            }
        }
        oldest
    }

    /// Requests waiting.
    pub fn requests(&self) -> u32 {
        self.requests
    }

    /// Tokens they count for.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Whether a request waits here.
    pub fn contains(&self, tenant: u32, adapter: Option<AdapterId>, id: u64) -> bool {
        self.lanes
            .get(&(tenant, adapter))
            .is_some_and(|lane| lane.contains_key(&id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn waiting(id: u64, tenant: u32, adapter: Option<AdapterId>) -> Waiting {
        Waiting {
            id,
            tenant,
            adapter,
            tokens: 10,
            submitted: Time::from_millis(id),
        }
    }

    fn queue(requests: u32) -> Queue {
        Queue::new(QueueLimits {
            requests,
            tokens: 1000,
        })
    }

    #[test]
    fn a_lane_whose_adapter_is_not_usable_is_passed_over() {
        let mut fairness = Fairness::default();
        let tenant = fairness.open(&Arc::from("t"), None);
        let mut queue = queue(10);
        queue.push(waiting(1, tenant, Some(AdapterId(1))));
        queue.push(waiting(2, tenant, None));
        let base_only = |adapter: Option<AdapterId>| adapter.is_none();
        assert_eq!(queue.next(&fairness, Time::ZERO, base_only), Some(2));
        assert_eq!(queue.next(&fairness, Time::ZERO, |_| true), Some(1));
    }

    #[test]
    fn one_tenant_leaves_half_of_the_queue_to_others_who_wait() {
        let mut queue = queue(4);
        queue.push(waiting(1, 0, None));
        queue.push(waiting(2, 0, None));
        assert!(queue.has_room(0, 10));
        queue.push(waiting(3, 1, None));
        assert!(!queue.has_room(0, 10));
        assert!(queue.has_room(1, 10));
        assert!(!queue.has_room(1, 10_000));
    }

    #[test]
    fn what_is_taken_out_is_no_longer_counted() {
        let mut queue = queue(4);
        queue.push(waiting(1, 0, None));
        queue.remove(waiting(1, 0, None));
        queue.remove(waiting(1, 0, None));
        assert_eq!((queue.requests(), queue.tokens()), (0, 0));
        assert!(queue.lanes.is_empty() && queue.tenants.is_empty());
    }
}
