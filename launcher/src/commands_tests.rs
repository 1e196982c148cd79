use clap::Parser;

use super::*;
use crate::plan::KvCache;
use crate::threads::Threads;

fn whole(flags: &[&str], variables: &[(&str, &str)]) -> [Invocation; 2] {
    let environment = Environment::of(variables);
    let args =
        Args::try_parse_from([&["launcher", "--model-id=org/m"], flags].concat()).expect("flags");
    let settings = Settings::check(args, &environment).expect("settings");
    let plan = Plan {
        place: crate::place::Place::Cpu { shards: 2 },
        threads: Threads {
            count: 4,
            processors: vec![vec![0, 1], vec![2, 3]],
            remark: None,
        },
        weight_bytes: 1,
        adapter_bytes: 7,
        kv_cache: KvCache {
            bytes: 9,
            pages: 1,
            page_tokens: 16,
        },
        state_bytes: 0,
        max_batch_size: settings.limits.max_batch_size,
        overhead_bytes: 1,
        max_input_tokens: 10,
        max_total_tokens: 20,
        remarks: Vec::new(),
    };
    let served = Served {
        model: "/models/m".into(),
        adapters: vec![
            ("a".into(), "/lora/a".into()),
            ("b".into(), "/lora/b".into()),
        ],
    };
    let run = Path::new("/run/kvrun-1");
    let site = Site {
        environment: &environment,
        settings: &settings,
        plan: &plan,
        served: &served,
        run,
    };
    [shard(site, 1, 3), router(site, 5, 6)]
}

fn line(invocation: &Invocation) -> String {
    let words: Vec<_> = invocation
        .args
        .iter()
        .map(|word| word.to_string_lossy())
        .collect();
    words.join(" ")
}

fn names(invocation: &Invocation) -> Vec<String> {
    invocation
        .variables
        .iter()
        .map(|(name, _)| name.to_string_lossy().into_owned())
        .collect()
}

#[test]
fn every_process_is_told_its_place() {
    let [shard, router] = whole(
        &[
            "--quantize=gptq",
            "--dtype=bfloat16",
            "--kv-cache-dtype=int8",
            "--activation-dtype=int8",
            "--packed-cache=/packed",
        ],
        &[],
    );
    assert_eq!(
        shard.program,
        PathBuf::from("/opt/bin/text-generation-server")
    );
    assert!(line(&shard).starts_with(
        "serve /models/m --uds-path /run/kvrun-1/shard-1 --rank 1 --world-size 2 --rendezvous \
         /run/kvrun-1/rendezvous-3 --model-id org/m --device cpu --dtype bfloat16 --kv-cache-dtype int8 \
         --quantize gptq --activation-dtype int8 --packed-cache /packed"
    ));
    assert!(line(&router).starts_with(
        "--http-fd 5 --control-fd 6 --shard-uds-path /run/kvrun-1/shard --num-shard 2 --tokenizer-name /models/m"
    ));
    assert!(line(&router).contains("--lora-adapters a=/lora/a;b=/lora/b"));
    assert!(line(&shard).contains(" --num-threads 4 "));
    assert_eq!((shard.processors, router.processors), (vec![2, 3], vec![]));
}

#[test]
fn the_router_learns_where_adapters_come_from() {
    let [_, router] = whole(
        &["--allow-dynamic-lora", "--default-adapter-source=hub"],
        &[],
    );
    assert!(line(&router).contains("--allow-dynamic-lora --default-adapter-source hub"));
}

#[test]
fn the_router_learns_whether_steps_overlap() {
    for (flags, told) in [
        (&[][..], " --overlap auto "),
        (&["--overlap=on"], " --overlap on "),
        (&["--overlap=off"], " --overlap off "),
    ] {
        let [_, router] = whole(flags, &[]);
        assert!(line(&router).contains(told));
    }
}

#[test]
fn threads_of_a_shard_do_not_spin_unless_the_operator_says_so() {
    let policy = |variables: &[(&str, &str)]| {
        let [shard, _] = whole(&[], variables);
        let of_it = |(name, _): &&(OsString, OsString)| name == "OMP_WAIT_POLICY";
        let found: Vec<_> = shard.variables.iter().filter(of_it).cloned().collect();
        found
    };
    let is = |value: &str| vec![("OMP_WAIT_POLICY".into(), value.into())];
    assert_eq!(policy(&[]), is("passive"));
    assert_eq!(policy(&[("OMP_WAIT_POLICY", "active")]), is("active"));
}

#[test]
fn secrets_are_in_no_argument_and_reach_no_shard() {
    let [shard, router] = whole(
        &["--api-key=hunter2", "--admin-api-key=hunter5"],
        &[
            ("HF_TOKEN", "hunter3"),
            ("MY_KEY", "hunter4"),
            ("PATH", "/bin"),
            ("PORT", "80"),
            ("HOSTNAME", "::1"),
        ],
    );
    for invocation in [&shard, &router] {
        assert!(!line(invocation).contains("hunter"), "{}", line(invocation));
    }
    assert_eq!(names(&shard), ["PATH", "HF_HUB_OFFLINE", "OMP_WAIT_POLICY"]);
    assert_eq!(
        names(&router),
        ["HF_TOKEN", "MY_KEY", "PATH", "API_KEY", "ADMIN_API_KEY"]
    );
}
