//! Which adapters lie in pages, and which of them have to leave first.

use super::{AdapterOrder, AdapterView, Adapters, LoadFault, Residency};
use crate::AdapterId;
use crate::pages::Run;

/// Loaded, and to be unloaded.
#[derive(Debug)]
pub(super) struct Useless {
    pub(super) bytes: u64,
    /// Whether the unload was ordered.
    ordered: bool,
}

impl Adapters {
    /// Pages that an adapter takes of the pool beside the sequences that use it, as far as is known; 0 for the base model.
    pub(crate) fn pages(&self, id: Option<AdapterId>) -> u32 {
        id.and_then(|id| self.all.get(&id))
            .map_or(0, |view| view.pages)
    }

    /// Pages that it has to be placed in before a row under it runs; 0 where it lies already, or needs none.
    pub(crate) fn unplaced(&self, id: AdapterId) -> u32 {
        let absent = self.all.get(&id).filter(|view| view.place.is_none());
        absent.map_or(0, |view| view.pages)
    }

    /// It lies there from the next step on.
    pub(crate) fn place(&mut self, id: AdapterId, run: Run) {
        if let Some(view) = self.all.get_mut(&id) {
            view.place = Some(run);
        }
    }

    /// It lies nowhere from the next step on. Answers with the shard's name for it and where it lay.
    pub(crate) fn displace(&mut self, id: AdapterId) -> Option<(u64, Run)> {
        let view = self.all.get_mut(&id)?;
        let handle = view.residency.handle()?;
        Some((handle, view.place.take()?))
    }

    /// The adapter in pages beside `wanted` that leaves first, if one of them may: none of its sequences runs. Those that
    /// are pinned leave last, before them those that requests wait for, before them the one that was used last of all.
    pub(crate) fn coldest(&self, wanted: Option<AdapterId>) -> Option<AdapterId> {
        self.all
            .iter()
            .filter(|(_, view)| view.place.is_some() && view.running == 0)
            .filter(|(id, _)| Some(**id) != wanted)
            .min_by_key(|(_, view)| (view.pinned, view.users > 0, view.used_at))
            .map(|(&id, _)| id)
    }

    /// Where adapters lie.
    pub(crate) fn placed(&self) -> impl Iterator<Item = (AdapterId, Run)> + '_ {
        let lies = |(&id, view): (&AdapterId, &AdapterView)| Some((id, view.place?));
        self.all.iter().filter_map(lies)
    }

    /// An adapter that was just loaded wants all of a pool or more: no row of it can ever run.
    pub(crate) fn too_large(&mut self, id: AdapterId, pool: u32) {
        let Some(view) = self.all.get_mut(&id) else {
            return;
        };
        let Some(handle) = view.residency.handle() else {
            return;
        };
        let reason = format!(
            "the adapter takes {} pages and the pool has {pool}, some of which its requests need; \
             give keys and values more memory, or train it at a lower rank",
            view.pages
        );
        view.residency = Residency::Failed {
            fault: LoadFault::NoRoom,
            reason,
        };
        let (bytes, ordered) = (view.bytes, false);
        self.by_handle.remove(&handle);
        self.useless.insert(handle, Useless { bytes, ordered });
    }

    /// Whether something has to be unloaded that nobody can use.
    pub(super) fn has_useless(&self) -> bool {
        self.useless.values().any(|useless| !useless.ordered)
    }

    pub(super) fn unload_useless(&mut self, orders: &mut Vec<AdapterOrder>) {
        for (&handle, useless) in &mut self.useless {
            if !std::mem::replace(&mut useless.ordered, true) {
                orders.push(AdapterOrder::Unload { handle });
            }
        }
    }
}

impl Residency {
    /// The shard's name for what it holds.
    fn handle(&self) -> Option<u64> {
        match *self {
            Self::Resident { handle } | Self::Unloading { handle } => Some(handle),
            _ => None,
        }
    }
}
