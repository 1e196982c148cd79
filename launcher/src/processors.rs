//! The processors that this process may run on: which of them are one core, and how much of their time is granted.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::control_group::{self, Version};

/// Processors as the kernel numbers them: those that the affinity mask and the cpuset leave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Processors {
    /// Each physical core with its usable hardware threads, cores of one memory node side by side.
    pub cores: Vec<Vec<u32>>,
    /// Thousandths of a processor whose time control groups grant; nothing where they set no bound.
    pub granted_millis: Option<u64>,
}

impl Processors {
    /// Those of this process.
    pub fn read() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::of(&allowed(), Path::new("/sys"), &own)
    }

    /// The `allowed` ones of the machine that `system`, its `/sys`, describes; `own` is the text of `/proc/self/cgroup`.
    pub fn of(allowed: &[u32], system: &Path, own: &str) -> Self {
        let read = |path: &Path| fs::read_to_string(path).map(|text| parse(&text));
        let entries = fs::read_dir(system.join("devices/system/node"));
        let nodes: BTreeMap<u32, Vec<u32>> = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let number = entry.file_name().to_str()?.strip_prefix("node")?.parse();
                Some((number.ok()?, read(&entry.path().join("cpulist")).ok()?))
            })
            .collect();
        let node = |processor| {
            let found = nodes.iter().find(|(_, list)| list.contains(&processor));
            found.map(|(number, _)| *number)
        };
        let mut cores: BTreeMap<_, Vec<u32>> = BTreeMap::new();
        for processor in allowed {
            let topology = format!("devices/system/cpu/cpu{processor}/topology");
            let siblings = read(&system.join(topology).join("thread_siblings_list"));
            let first = siblings.ok().and_then(|list| list.into_iter().min());
            let core = (node(*processor), first.unwrap_or(*processor));
            cores.entry(core).or_default().push(*processor);
        }
        Self {
            cores: cores.into_values().collect(),
            granted_millis: granted_millis(&system.join("fs/cgroup"), own),
        }
    }

    /// How many there are: hardware threads.
    pub fn count(&self) -> usize {
        self.cores.iter().map(Vec::len).sum()
    }

    /// For people.
    pub fn describe(&self) -> String {
        let (cores, processors) = (self.cores.len(), self.count());
        let mut text = format!("{cores} core{}", if cores == 1 { "" } else { "s" });
        if processors > cores {
            text += &format!(" of {processors} hardware threads");
        }
        if let Some(millis) = self.granted_millis {
            text += &format!(", granted the time of {}", millis as f64 / 1e3);
        }
        text
    }
}

fn allowed() -> Vec<u32> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        return (0..count as u32).collect();
    };
    let all = 0..CpuSet::count();
    all.filter(|number| set.is_set(*number).unwrap_or(false))
        .map(|number| number as u32)
        .collect()
}

/// The least that any control group between this process's own and the root grants.
fn granted_millis(root: &Path, own: &str) -> Option<u64> {
    let (version, folders) = control_group::folders(root, own, "cpu");
    let bounds = folders.iter().filter_map(|folder| {
        let read = |file| fs::read_to_string(folder.join(file)).ok();
        let (quota, period) = match version {
            Version::One => (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?),
            Version::Two => {
                let text = read("cpu.max")?;
                let (quota, period) = text.split_once(' ')?;
                (quota.to_owned(), period.to_owned())
            }
        };
        // No bound is "max" in version 2 and -1 in version 1; neither is such a number.
        let quota: u64 = quota.trim().parse().ok()?;
        (quota * 1000).checked_div(period.trim().parse().ok()?)
    });
    bounds.min()
}

/// Reads a list as the kernel writes it: `0-3,8`. What is no number is left out.
pub fn parse(list: &str) -> Vec<u32> {
    let parts = list.trim().split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u32>().ok()?..=last.parse().ok()?)
    });
    parts.flatten().collect()
}

/// Writes a list as the kernel does; `numbers` rise.
pub fn list(numbers: &[u32]) -> String {
    let runs = numbers.chunk_by(|one, next| one + 1 == *next);
    let parts = runs.map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        only => only.iter().map(u32::to_string).collect(),
    });
    parts.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
#[path = "processors_tests.rs"]
mod tests;
