//! What must hold of adapters, recomputed from counts that were taken elsewhere.

use super::{AdapterView, Adapters, Residency};
use crate::AdapterId;
use std::collections::BTreeMap;

impl Adapters {
    /// Checks users and holders against counts taken elsewhere; the text names the adapter and what disagrees.
    pub(crate) fn audit(
        &self,
        users: &BTreeMap<AdapterId, u32>,
        held: &BTreeMap<AdapterId, u32>,
        running: &BTreeMap<AdapterId, u32>,
    ) -> Result<(), String> {
        for (id, view) in &self.all {
            view.audit_place(id.0, running.get(id).copied().unwrap_or(0))?;
            let (open, on_shard) = (
                users.get(id).copied().unwrap_or(0),
                held.get(id).copied().unwrap_or(0),
            );
            if (view.users, view.held) != (open, on_shard) {
                return Err(format!(
                    "adapter {}: {} users and {} holders counted, {open} and {on_shard} exist",
                    id.0, view.users, view.held
                ));
            }
            if view.held > 0 && !matches!(view.residency, Residency::Resident { .. }) {
                return Err(format!(
                    "adapter {} left while {} sequences use it",
                    id.0, view.held
                ));
            }
        }
        match users.keys().find(|id| !self.all.contains_key(id)) {
            Some(id) => Err(format!("adapter {} is gone while requests use it", id.0)),
            None => Ok(()),
        }
    }
}

impl AdapterView {
    /// Checks where it lies against how many of its sequences run.
    pub(super) fn audit_place(&self, id: u64, running: u32) -> Result<(), String> {
        if self.running != running {
            return Err(format!(
                "adapter {id}: {} running sequences counted, {running} run",
                self.running
            ));
        }
        let (lies, wants) = (self.place.map_or(0, |run| run.pages), self.pages);
        if lies > 0 && (lies != wants || !matches!(self.residency, Residency::Resident { .. })) {
            return Err(format!(
                "adapter {id} lies in {lies} pages, wants {wants} and is {:?}",
                self.residency
            ));
        }
        if running > 0 && lies != wants {
            return Err(format!(
                "adapter {id} lies in {lies} of {wants} pages while {running} sequences run"
            ));
        }
        Ok(())
    }
}
