//! Fairness judged from outside: what every tenant was served, counted from the steps that the shard got.

use super::{Client, World};
use kvrun_scheduler::{Step, Time};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Tokens of credit for each second that a request has waited.
const CREDIT_PER_SECOND: u128 = 16;
/// Deaths in flight after which a request goes alone and out of turn.
const SUSPICIOUS: u32 = 2;

/// Tokens served to each tenant. Who comes back starts from the least of those who are there: silence earns nothing.
#[derive(Debug, Default)]
pub(super) struct Served(BTreeMap<Arc<str>, u64>);

impl Served {
    fn of(&self, client: &Client) -> u64 {
        let served = self.0.get(&client.request.tenant);
        served.copied().unwrap_or(0)
    }

    fn charge(&mut self, client: &Client, tokens: u32) {
        let served = self.0.entry(client.request.tenant.clone()).or_default();
        *served += u64::from(tokens);
    }

    /// What counts when turns are given out: the least goes first.
    fn rank(&self, client: &Client, now: Time) -> u64 {
        let waited = now.saturating_sub(client.submitted).as_millis();
        let credit = waited * CREDIT_PER_SECOND / 1000;
        self.of(client).saturating_sub(credit as u64)
    }
}

impl World {
    /// A request of this tenant comes.
    pub(super) fn enter(&mut self, tenant: &Arc<str>) {
        let open = || self.clients.values().filter(|client| !client.ended);
        if open().any(|client| client.request.tenant == *tenant) {
            return;
        }
        let least = open().map(|client| self.served.of(client)).min();
        let own = self.served.0.entry(tenant.clone()).or_default();
        *own = (*own).max(least.unwrap_or(0));
    }

    /// A token came beside another of the same step.
    pub(super) fn served_on_a_guess(&mut self, client: &Client) {
        self.served.charge(client, 1);
        self.seen.right_guesses += 1;
    }

    /// Nobody is given a turn before another tenant's request that could have it and whose tenant was served less. So
    /// between two tenants that both wait, the gap in service is at most what the running requests of one still take.
    pub(super) fn judge_turns(&mut self, step: &Step) -> Result<(), String> {
        let admitted = |id: &u64| step.admit.iter().any(|admission| admission.sequence == *id);
        for admission in &step.admit {
            let Some(client) = self.clients.get(&admission.sequence) else {
                return Err(format!("{} is admitted and unknown", admission.sequence));
            };
            let rank = self.served.rank(client, self.now);
            // Requests for the base model wait for nothing but their turn.
            let passed_over = self.clients.iter().filter(|(id, other)| {
                let waits = !other.ended && !other.running && !admitted(id);
                waits && other.request.adapter.is_none()
            });
            for (id, other) in passed_over.filter(|_| client.strikes < SUSPICIOUS) {
                let least = self.served.rank(other, self.now);
                hold!(
                    rank <= least || other.request.tenant == client.request.tenant,
                    "request {} of {} got its turn at {rank} before {id} of {} at {least}",
                    admission.sequence,
                    client.request.tenant,
                    other.request.tenant
                );
                self.seen.turns += u64::from(other.request.tenant != client.request.tenant);
            }
            self.served.charge(client, client.request.memory_tokens);
        }
        for row in &step.rows {
            if let Some(client) = self.clients.get(&row.sequence) {
                self.served.charge(client, row.known());
            }
        }
        for id in &step.release {
            self.clients
                .entry(*id)
                .and_modify(|client| client.running = false);
        }
        for admission in &step.admit {
            self.clients
                .entry(admission.sequence)
                .and_modify(|client| client.running = true);
        }
        Ok(())
    }
}
