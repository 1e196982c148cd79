//! Who is next: a virtual token counter per tenant and, within a tenant, per adapter.
//!
//! Whoever was served least goes first. A newcomer starts from the least counter of those already active, so that
//! silence earns no credit; waiting earns a little, so that a stream of newcomers starves nobody.

use crate::{AdapterId, Time};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Tokens of credit for each second that the head of a lane has waited.
const CREDIT_PER_SECOND: u128 = 16;

/// Idle tenants remembered before the least served of them are forgotten.
const IDLE_TENANTS: usize = 64;

#[derive(Debug, Default)]
struct Share {
    served: u64,
    open: u32,
    adapters: BTreeMap<Option<AdapterId>, AdapterShare>,
}

#[derive(Debug, Default)]
struct AdapterShare {
    served: u64,
    open: u32,
}

/// Counters of all tenants.
#[derive(Debug, Default)]
pub struct Fairness {
    numbers: HashMap<Arc<str>, u32>,
    shares: BTreeMap<u32, (Arc<str>, Share)>,
    next: u32,
}

impl Fairness {
    /// A request of a tenant opens; answers with the tenant's number.
    pub fn open(&mut self, tenant: &Arc<str>, adapter: Option<AdapterId>) -> u32 {
        let number = match self.numbers.get(tenant) {
            Some(&number) => number,
            None => self.enrol(tenant),
        };
        let active = self.shares.values().filter(|(_, share)| share.open > 0);
        let floor = active.map(|(_, share)| share.served).min().unwrap_or(0);
        let Some((_, share)) = self.shares.get_mut(&number) else {
            return number;
        };
        if share.open == 0 {
            share.served = share.served.max(floor);
        }
        share.open += 1;
        let active = share.adapters.values().filter(|lane| lane.open > 0);
        let floor = active.map(|lane| lane.served).min().unwrap_or(0);
        let lane = share.adapters.entry(adapter).or_default();
        if lane.open == 0 {
            lane.served = lane.served.max(floor);
        }
        lane.open += 1;
        number
    }

    /// A request closes.
    pub fn close(&mut self, tenant: u32, adapter: Option<AdapterId>) {
        let Some((_, share)) = self.shares.get_mut(&tenant) else {
            return;
        };
        share.open -= 1;
        if let Some(lane) = share.adapters.get_mut(&adapter) {
            lane.open -= 1;
        }
        if share.open == 0 {
            // Between a tenant's own adapters there is nothing left to be fair about.
            share.adapters.clear();
            self.forget_idle();
        }
    }

    /// `tokens` were computed for a request.
    pub fn charge(&mut self, tenant: u32, adapter: Option<AdapterId>, tokens: u32) {
        if let Some((_, share)) = self.shares.get_mut(&tenant) {
            share.served += u64::from(tokens);
            if let Some(lane) = share.adapters.get_mut(&adapter) {
                lane.served += u64::from(tokens);
            }
        }
    }

    /// Orders lanes: the least goes first. `waited` is how long the lane's head has been in the queue.
    pub fn rank(&self, tenant: u32, adapter: Option<AdapterId>, waited: Time) -> (u64, u64) {
        let credit = (waited.as_millis() * CREDIT_PER_SECOND / 1000) as u64;
        let Some((_, share)) = self.shares.get(&tenant) else {
            return (0, 0);
        };
        let lane = share.adapters.get(&adapter).map_or(0, |lane| lane.served);
        (
            share.served.saturating_sub(credit),
            lane.saturating_sub(credit),
        )
    }

    /// Requests open now.
    pub fn open_requests(&self) -> u32 {
        self.shares.values().map(|(_, share)| share.open).sum()
    }

    fn enrol(&mut self, tenant: &Arc<str>) -> u32 {
        let number = self.next;
        self.next += 1;
        self.numbers.insert(tenant.clone(), number);
        self.shares
            .insert(number, (tenant.clone(), Share::default()));
        number
    }

    /// Keeps memory bounded: of the idle tenants the least served lose nothing by starting over.
    fn forget_idle(&mut self) {
        let mut idle: Vec<_> = self
            .shares
            .iter()
            .filter(|(_, (_, share))| share.open == 0)
            .map(|(&number, (_, share))| (share.served, number))
            .collect();
        if idle.len() <= 2 * IDLE_TENANTS {
            return;
        }
        idle.sort_unstable();
        for (_, number) in &idle[..idle.len() - IDLE_TENANTS] {
            if let Some((name, _)) = self.shares.remove(number) {
                self.numbers.remove(&name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_served_goes_first_and_silence_earns_no_credit() {
        let mut fairness = Fairness::default();
        let (loud, quiet): (Arc<str>, Arc<str>) = (Arc::from("loud"), Arc::from("quiet"));
        let loud = fairness.open(&loud, None);
        fairness.charge(loud, None, 1000);
        let quiet = fairness.open(&quiet, None);
        assert_eq!(
            fairness.rank(quiet, None, Time::ZERO).0,
            fairness.rank(loud, None, Time::ZERO).0
        );
        fairness.charge(loud, None, 10);
        assert!(fairness.rank(quiet, None, Time::ZERO) < fairness.rank(loud, None, Time::ZERO));
    }

    #[test]
    fn waiting_outweighs_a_newcomer_in_the_end() {
        let mut fairness = Fairness::default();
        let old = fairness.open(&Arc::from("old"), None);
        let new = fairness.open(&Arc::from("new"), None);
        fairness.charge(old, None, 100);
        let waited = Time::from_secs(10);
        assert!(
            fairness.rank(old, None, waited) < fairness.rank(new, None, Time::ZERO).max((1, 1))
        );
    }

    #[test]
    fn adapters_of_one_tenant_share_its_part() {
        let mut fairness = Fairness::default();
        let name: Arc<str> = Arc::from("t");
        let (a, b) = (Some(AdapterId(1)), Some(AdapterId(2)));
        let tenant = fairness.open(&name, a);
        fairness.open(&name, b);
        fairness.charge(tenant, a, 5);
        assert!(fairness.rank(tenant, b, Time::ZERO) < fairness.rank(tenant, a, Time::ZERO));
    }

    #[test]
    fn idle_tenants_are_forgotten() {
        let mut fairness = Fairness::default();
        for number in 0..10_000 {
            let tenant = fairness.open(&Arc::from(format!("key {number}")), None);
            fairness.close(tenant, None);
        }
        assert!(fairness.shares.len() <= 2 * IDLE_TENANTS + 1);
        assert_eq!(fairness.numbers.len(), fairness.shares.len());
    }
}
