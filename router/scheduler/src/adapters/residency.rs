//! Who lies on the shard: loads, evictions, and turns where more adapters are asked for than fit.

use super::{AdapterOrder, AdapterView, Adapters, LoadFault, Residency};
use crate::{AdapterId, Time};
use std::collections::BTreeMap;

/// Loads that run at once.
const LOADS_AT_ONCE: usize = 4;
/// A request waits this long before an adapter in use has to make room for its own.
const ROTATION: Time = Time::from_secs(2);
/// Loads in a row without a verdict of the shard after which an adapter is given up.
const UNANSWERED_LOADS: u32 = 5;
/// Between a load without a verdict and the next; doubles each time.
const PAUSE: Time = Time::from_millis(250);

impl Adapters {
    /// Whether `plan` could have anything to order.
    pub(crate) fn restless(&self) -> bool {
        let quiet = self.wanted.is_empty() && self.leaving.is_empty() && !self.has_useless();
        self.serving && !quiet
    }

    /// Orders what may be loaded and unloaded now. `oldest` says since when requests wait for each adapter.
    /// Answers with adapters that can never fit.
    pub(crate) fn plan(
        &mut self,
        now: Time,
        oldest: &BTreeMap<AdapterId, Time>,
        orders: &mut Vec<AdapterOrder>,
    ) -> Vec<AdapterId> {
        self.dismiss(orders);
        self.unload_useless(orders);
        let mut refused = Vec::new();
        let mut queue: Vec<_> = self
            .wanted
            .iter()
            .map(|&id| (oldest.get(&id).copied().unwrap_or(Time::MAX), id))
            .collect();
        queue.sort_unstable();
        for (since, id) in queue {
            if self.loading() >= LOADS_AT_ONCE {
                break;
            }
            let Some(view) = self.all.get(&id) else {
                self.wanted.remove(&id);
                continue;
            };
            if now < view.rests_until {
                continue;
            }
            let (need, proven, users) = (view.bytes, view.digest.is_some(), view.users);
            if self.taken().saturating_add(need) <= self.capacity {
                self.load(id, orders);
                continue;
            }
            let others_leave = self.make_room(need, orders);
            if others_leave {
                break;
            }
            let never = need.saturating_add(self.pinned()) > self.capacity;
            if never || (!proven && users == 0) {
                self.refuse(id, need);
                refused.push(id);
            } else if users == 0 {
                // Nobody waits for it; the next request will ask again.
                self.wanted.remove(&id);
            } else {
                self.rotate(now, since, need);
                break;
            }
        }
        if self.wanted.is_empty() {
            self.all.values_mut().for_each(|view| view.yielding = false);
        }
        refused
    }

    /// Lets leaving adapters go once nobody uses them.
    fn dismiss(&mut self, orders: &mut Vec<AdapterOrder>) {
        let done: Vec<_> = self
            .leaving
            .iter()
            .copied()
            .filter(|id| {
                self.all
                    .get(id)
                    .is_none_or(|view| view.users == 0 && view.held == 0)
            })
            .collect();
        for id in done {
            match self.all.get(&id).map(|view| view.residency.clone()) {
                Some(Residency::Resident { .. }) => self.unload(id, orders),
                Some(Residency::Loading { .. } | Residency::Unloading { .. }) => {}
                _ => {
                    self.all.remove(&id);
                    self.wanted.remove(&id);
                    self.leaving.remove(&id);
                }
            }
        }
    }

    /// A load failed. Answers with the adapter when that is final; otherwise it is tried again: with more room when
    /// the estimate was too low, after a pause when the shard gave no verdict. Where an early one found no room, no
    /// further one is loaded early.
    pub(crate) fn load_failed(
        &mut self,
        now: Time,
        handle: u64,
        fault: LoadFault,
        reason: &str,
    ) -> Option<AdapterId> {
        let id = self.by_handle.remove(&handle)?;
        let others = self.taken() - self.all.get(&id)?.bytes.min(self.taken());
        let others_load = self.loading() > 1;
        let capacity = self.capacity;
        let view = self.all.get_mut(&id)?;
        let crowded = others > 0 || others_load;
        if fault == LoadFault::NoRoom && crowded && self.early.contains(&id) {
            view.residency = Residency::Absent;
            self.wanted.retain(|id| !self.early.contains(id));
            return None;
        }
        let again = match fault {
            LoadFault::NoRoom if crowded => {
                // Ask for a byte more than was free, which evicts one more idle adapter.
                view.bytes = view.bytes.max(capacity.saturating_sub(others) + 1);
                true
            }
            LoadFault::Unanswered => {
                view.rests_until = now.saturating_add(PAUSE * (1 << view.unanswered));
                view.unanswered += 1;
                view.unanswered < UNANSWERED_LOADS
            }
            _ => false,
        };
        if again {
            view.residency = Residency::Absent;
            self.wanted.insert(id);
            return None;
        }
        view.unanswered = 0;
        view.rests_until = Time::ZERO;
        let reason = reason.to_owned();
        view.residency = Residency::Failed { fault, reason };
        Some(id)
    }

    fn loading(&self) -> usize {
        let loading = |view: &&AdapterView| matches!(view.residency, Residency::Loading { .. });
        self.all.values().filter(loading).count()
    }

    /// Bytes that never make room for others.
    fn pinned(&self) -> u64 {
        self.bytes_of(|view| view.pinned && matches!(view.residency, Residency::Resident { .. }))
    }

    fn load(&mut self, id: AdapterId, orders: &mut Vec<AdapterOrder>) {
        self.wanted.remove(&id);
        self.last_handle += 1;
        let handle = self.last_handle;
        if let Some(view) = self.all.get_mut(&id) {
            view.residency = Residency::Loading { handle };
            self.by_handle.insert(handle, id);
            orders.push(AdapterOrder::Load {
                adapter: id,
                handle,
            });
        }
    }

    fn unload(&mut self, id: AdapterId, orders: &mut Vec<AdapterOrder>) {
        if let Some(view) = self.all.get_mut(&id)
            && let Residency::Resident { handle } = view.residency
        {
            view.residency = Residency::Unloading { handle };
            orders.push(AdapterOrder::Unload { handle });
        }
    }

    /// Evicts idle adapters, least recently used first, until `need` bytes will be free. Says whether they will.
    fn make_room(&mut self, need: u64, orders: &mut Vec<AdapterOrder>) -> bool {
        loop {
            let staying = self.bytes_of(stays);
            if staying.saturating_add(need) <= self.capacity {
                return true;
            }
            let idle = self
                .all
                .iter()
                .filter(|(_, view)| matches!(view.residency, Residency::Resident { .. }))
                .filter(|(_, view)| {
                    !view.pinned && view.held == 0 && (view.users == 0 || view.yielding)
                })
                .min_by_key(|(_, view)| view.used_at)
                .map(|(&id, _)| id);
            match idle {
                Some(id) => self.unload(id, orders),
                None => return false,
            }
        }
    }

    /// Makes the adapter that has been resident longest yield its place, once somebody waited long enough for one.
    fn rotate(&mut self, now: Time, since: Time, need: u64) {
        let staying = self.bytes_of(|view| !view.yielding && stays(view));
        let enough_yield = staying.saturating_add(need) <= self.capacity;
        if enough_yield || now < since.saturating_add(ROTATION) {
            return;
        }
        let longest = self
            .all
            .values_mut()
            .filter(|view| matches!(view.residency, Residency::Resident { .. }))
            .filter(|view| !view.pinned && !view.yielding && now >= view.resident_since + ROTATION)
            .min_by_key(|view| view.resident_since);
        if let Some(view) = longest {
            view.yielding = true;
        }
    }

    fn refuse(&mut self, id: AdapterId, need: u64) {
        self.wanted.remove(&id);
        let (taken, capacity) = (self.taken(), self.capacity);
        if let Some(view) = self.all.get_mut(&id) {
            let reason = format!(
                "the adapter takes about {need} bytes, {taken} of {capacity} are taken by adapters in use; \
                 unload one or give adapters more memory"
            );
            view.residency = Residency::Failed {
                fault: LoadFault::NoRoom,
                reason,
            };
        }
    }
}

/// Whether an adapter is on the shard, or soon, and nobody sent it away.
fn stays(view: &AdapterView) -> bool {
    matches!(
        view.residency,
        Residency::Loading { .. } | Residency::Resident { .. }
    )
}
