use super::*;

const BARE: &str = "0::/\n";

/// A made-up `/sys`: files by their paths.
fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a folder");
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, text).expect("a file");
    }
    root
}

/// The topology of processors, each by the list of those on its core.
fn with_siblings(lists: &[&str]) -> tempfile::TempDir {
    let root = system(&[]);
    for (processor, list) in lists.iter().enumerate() {
        let folder = format!("devices/system/cpu/cpu{processor}/topology");
        let folder = root.path().join(folder);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join("thread_siblings_list"), format!("{list}\n")).expect("a file");
    }
    root
}

#[test]
fn this_process_has_a_processor() {
    let processors = Processors::read();
    assert!(!processors.cores.is_empty() && processors.count() >= processors.cores.len());
}

#[test]
fn hardware_threads_of_one_core_are_one_core() {
    let machine = with_siblings(&["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]);
    let of = |allowed: &[u32]| Processors::of(allowed, machine.path(), BARE);
    let all = of(&[0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(all.cores, [[0, 4], [1, 5], [2, 6], [3, 7]]);
    assert_eq!(all.describe(), "4 cores of 8 hardware threads");
    // As under `taskset -c 2,4-7`.
    let some = of(&[2, 4, 5, 6, 7]);
    assert_eq!(some.cores, [vec![4], vec![5], vec![2, 6], vec![7]]);
    assert_eq!((some.cores.len(), some.count()), (4, 5));
}

#[test]
fn a_machine_that_tells_no_topology_has_a_core_for_each_processor() {
    let machine = system(&[]);
    let processors = Processors::of(&[0, 1, 5], machine.path(), BARE);
    assert_eq!(processors.cores, [[0], [1], [5]]);
    assert_eq!(processors.describe(), "3 cores");
}

#[test]
fn cores_of_one_memory_node_stand_side_by_side() {
    // Some machines number their processors in turns over the nodes.
    let machine = system(&[
        ("devices/system/node/node0/cpulist", "0,2,4,6\n"),
        ("devices/system/node/node1/cpulist", "1,3,5,7\n"),
        ("devices/system/node/possible", "0-1\n"),
    ]);
    let processors = Processors::of(&[0, 1, 2, 3, 4, 5, 6, 7], machine.path(), BARE);
    assert_eq!(processors.cores.concat(), [0, 2, 4, 6, 1, 3, 5, 7]);
}

#[test]
fn the_tightest_quota_counts() {
    let granted = |own: &str, files: &[(&str, &str)]| {
        let machine = system(files);
        Processors::of(&[0], machine.path(), own).granted_millis
    };
    let two = [
        ("fs/cgroup/pod/cpu.max", "350000 100000\n"),
        ("fs/cgroup/pod/app/cpu.max", "max 100000\n"),
        ("fs/cgroup/pod/tight/cpu.max", "50000 100000\n"),
    ];
    assert_eq!(granted("0::/pod/app\n", &two), Some(3500));
    assert_eq!(granted("0::/pod/tight\n", &two), Some(500));
    assert_eq!(granted("0::/elsewhere\n", &two), None);
    // A container without the files of its host's groups finds its own at the root.
    assert_eq!(
        granted("0::/\n", &[("fs/cgroup/cpu.max", "200000 100000\n")]),
        Some(2000)
    );
    let one = |quota| {
        [
            ("fs/cgroup/cpu/cpu.cfs_quota_us", quota),
            ("fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
        ]
    };
    let own = "4:cpu,cpuacct:/docker/f00\n0::/x\n";
    assert_eq!(granted(own, &one("150000\n")), Some(1500));
    assert_eq!(granted(own, &one("-1\n")), None);
    assert_eq!(
        granted("0::/\n", &[("fs/cgroup/cpu.max", "1 0\n")]),
        None,
        "a period of nothing is no bound"
    );
}

#[test]
fn lists_are_read_and_written_as_the_kernel_does() {
    for (text, numbers) in [
        ("0", vec![0]),
        ("0-3,8", vec![0, 1, 2, 3, 8]),
        ("1,3,5-6", vec![1, 3, 5, 6]),
        ("", vec![]),
    ] {
        assert_eq!(parse(text), numbers);
        assert_eq!(list(&numbers), text);
    }
    assert_eq!(parse("0-1\n"), [0, 1]);
}
