//! What this machine has: processors, memory, GPUs. Read from the kernel, with the limits of the container it is in.

use std::fs;
use std::path::Path;

use crate::control_group::{self, Version};
use crate::processors::Processors;

/// The machine as the plan sees it. All sizes in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    pub processors: Processors,
    /// What the processor calls itself.
    pub processor: String,
    /// Memory of the machine, or of the container if that is less.
    pub memory_total: u64,
    /// Memory that can be had without swapping.
    pub memory_available: u64,
    pub gpus: Vec<Gpu>,
}

/// One GPU that this process may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gpu {
    pub uuid: String,
    pub name: String,
    pub memory_total: u64,
    pub memory_available: u64,
}

impl Machine {
    /// Reads `/proc` and `/sys`; `gpus` is the answer of [`GPU_QUERY`], empty where there is none, `visible` says which of
    /// them this process may use, as `CUDA_VISIBLE_DEVICES` does.
    pub fn read(gpus: &str, visible: Option<&str>) -> Self {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let (total, available) = (field(&memory, "MemTotal:"), field(&memory, "MemAvailable:"));
        let group = memory_group(
            Path::new("/sys/fs/cgroup"),
            &fs::read_to_string("/proc/self/cgroup").unwrap_or_default(),
        );
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            processors: Processors::read(),
            processor: processor(&cpu),
            memory_total: group.map_or(total, |group| group.limit.min(total)),
            memory_available: group.map_or(available, |group| {
                group.limit.saturating_sub(group.used).min(available)
            }),
            gpus: seen(gpus.lines().filter_map(gpu).collect(), visible),
        }
    }
}

/// The program that lists GPUs, and its arguments; one line of UUID, name, total and free MiB for each.
pub const GPU_QUERY: (&str, &[&str]) = (
    "nvidia-smi",
    &[
        "--query-gpu=uuid,name,memory.total,memory.free",
        "--format=csv,noheader,nounits",
    ],
);

fn gpu(line: &str) -> Option<Gpu> {
    let mut parts = line.rsplitn(3, ',').map(str::trim);
    let (free, total) = (parts.next()?, parts.next()?);
    let (uuid, name) = parts.next()?.split_once(',')?;
    let mebibytes = |text: &str| text.parse::<u64>().ok().map(|count| count << 20);
    Some(Gpu {
        uuid: uuid.trim().to_owned(),
        name: name.trim().to_owned(),
        memory_total: mebibytes(total)?,
        memory_available: mebibytes(free)?,
    })
}

/// Those that a list of numbers or beginnings of UUIDs names, in its order; as for the driver, the first name that is no
/// GPU's ends it.
fn seen(gpus: Vec<Gpu>, visible: Option<&str>) -> Vec<Gpu> {
    let Some(list) = visible else {
        return gpus;
    };
    let find = |name: &str| match name.parse::<usize>() {
        Ok(number) => gpus.get(number),
        Err(_) => gpus
            .iter()
            .find(|gpu| name.starts_with("GPU-") && gpu.uuid.starts_with(name)),
    };
    list.split(',')
        .map_while(|name| find(name.trim()).cloned())
        .collect()
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kibibytes = line
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

fn processor(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(':'))
        .map(|(_, name)| name.trim().to_owned())
        .unwrap_or_default()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MemoryGroup {
    limit: u64,
    /// Without pages of files, which the kernel gives back under pressure.
    used: u64,
}

/// The tightest limit between this process's control group and the root.
fn memory_group(root: &Path, own: &str) -> Option<MemoryGroup> {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let number = |path: &Path| read(path).and_then(|text| text.trim().parse::<u64>().ok());
    let (version, folders) = control_group::folders(root, own, "memory");
    let (limit, usage, cache) = match version {
        Version::One => (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
        Version::Two => ("memory.max", "memory.current", "inactive_file"),
    };
    let groups = folders.iter().filter_map(|group| {
        let limit = number(&group.join(limit))?;
        let statistics = read(&group.join("memory.stat")).unwrap_or_default();
        let of_files = statistics
            .lines()
            .find_map(|line| line.strip_prefix(cache)?.trim().parse::<u64>().ok());
        let used = number(&group.join(usage))?.saturating_sub(of_files.unwrap_or(0));
        // Version 1 writes "no limit" as a number near 2^63.
        (limit < 1 << 60).then_some(MemoryGroup { limit, used })
    });
    groups.min_by_key(|group| group.limit.saturating_sub(group.used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory() {
        let machine = Machine::read("", None);
        assert!(machine.memory_available > 0 && machine.memory_available <= machine.memory_total);
    }

    #[test]
    fn gpus_are_read_from_the_query() {
        let machine = Machine::read(
            "GPU-1, NVIDIA H200, 143771, 143000\nGPU-2, A, with comma, 10, 5\nno devices were found\n",
            None,
        );
        let facts: Vec<_> = machine
            .gpus
            .iter()
            .map(|gpu| (gpu.name.as_str(), gpu.memory_available >> 20))
            .collect();
        assert_eq!(facts, [("NVIDIA H200", 143_000), ("A, with comma", 5)]);
    }

    #[test]
    fn only_visible_gpus_are_used_in_their_order() {
        let query = "GPU-aa1, A, 1, 1\nGPU-ab2, B, 2, 2\nGPU-c, C, 3, 3\n";
        for (visible, names) in [
            (None, "A B C"),
            (Some("2,0"), "C A"),
            (Some("GPU-ab, 0"), "B A"),
            (Some("1,7,0"), "B"),
            (Some("MIG-aa1"), ""),
            (Some("-1"), ""),
            (Some(""), ""),
        ] {
            let gpus = Machine::read(query, visible).gpus;
            let found: Vec<_> = gpus.iter().map(|gpu| gpu.name.as_str()).collect();
            assert_eq!(found.join(" "), names, "{visible:?}");
        }
    }

    #[test]
    fn the_tightest_control_group_counts() {
        let root = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, text).expect("a file");
        };
        write("pod/memory.max", "1000000\n");
        write("pod/memory.current", "300000\n");
        write("pod/memory.stat", "anon 5\ninactive_file 100000\n");
        write("pod/app/memory.max", "max\n");
        write("pod/app/memory.current", "5\n");
        assert_eq!(
            memory_group(root.path(), "0::/pod/app\n"),
            Some(MemoryGroup {
                limit: 1_000_000,
                used: 200_000
            })
        );
        assert_eq!(memory_group(root.path(), "0::/elsewhere\n"), None);

        write("memory/pod/memory.limit_in_bytes", "9223372036854771712");
        write("memory/pod/memory.usage_in_bytes", "1");
        assert_eq!(
            memory_group(root.path(), "5:cpu:/pod\n4:memory:/pod\n"),
            None
        );
        write("memory/pod/memory.limit_in_bytes", "4096");
        assert_eq!(
            memory_group(root.path(), "4:memory:/pod\n"),
            Some(MemoryGroup {
                limit: 4096,
                used: 1
            })
        );
    }
}
