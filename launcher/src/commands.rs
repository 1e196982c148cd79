//! The arguments and environment of every child process.
//!
//! No secret is ever an argument. A shard sees a short list of variables; the router sees all but those that are
//! flags of the launcher, because it is given flags in their place.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use crate::args::{Args, Environment, is_forwarded_to_shards};
use crate::plan::Plan;
use crate::settings::Settings;

/// A program to start, with everything it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// The whole environment of the process.
    pub variables: Vec<(OsString, OsString)>,
    /// The processors that the process is kept to; none: it may run on those that the launcher may.
    pub processors: Vec<u32>,
}

/// Where the resolved model and adapters lie.
#[derive(Debug, Clone)]
pub struct Served {
    pub model: PathBuf,
    /// Name and folder of each adapter.
    pub adapters: Vec<(String, PathBuf)>,
}

const SERVER: &str = "text-generation-server";
const ROUTER: &str = "text-generation-router";

/// `text-generation-server` with a subcommand that reads or downloads files, and the variables that name caches and
/// tokens of the hub.
pub fn server(environment: &Environment, settings: &Settings, args: &[&OsStr]) -> Invocation {
    let operation = &settings.operation;
    let mut variables = environment.variables.clone();
    let caches = [
        ("HUGGINGFACE_HUB_CACHE", &operation.huggingface_hub_cache),
        ("WEIGHTS_CACHE_OVERRIDE", &operation.weights_cache_override),
    ];
    for (name, folder) in caches {
        if let Some(folder) = folder {
            set(&mut variables, name, folder);
        }
    }
    Invocation {
        program: environment.programs.join(SERVER),
        args: args.iter().map(OsString::from).collect(),
        variables,
        processors: Vec::new(),
    }
}

/// What router and shards are started from.
#[derive(Clone, Copy)]
pub struct Site<'a> {
    pub environment: &'a Environment,
    pub settings: &'a Settings,
    pub plan: &'a Plan,
    pub served: &'a Served,
    /// The instance's private folder.
    pub run: &'a Path,
}

/// The model process of one rank. `generation` counts the starts of the group, which meets anew each time.
pub fn shard(site: Site<'_>, rank: u32, generation: u32) -> Invocation {
    let Site {
        environment,
        settings,
        plan,
        served,
        run,
    } = site;
    let mut args = Arguments::default();
    args.word("serve").word(&served.model);
    args.flag("--uds-path", run.join(format!("shard-{rank}")));
    args.flag("--rank", rank.to_string());
    args.flag("--world-size", plan.place.shards().to_string());
    args.flag("--rendezvous", run.join(format!("rendezvous-{generation}")));
    args.flag("--model-id", &settings.model_id);
    let place = plan.place.arguments(settings);
    args.0.extend(place.into_iter().map(OsString::from));
    args.flag("--dtype", settings.dtype.name());
    args.flag("--kv-cache-dtype", settings.kv_cache_dtype.name());
    if let Some(format) = settings.quantize {
        args.flag("--quantize", format.name());
    }
    args.flag("--activation-dtype", settings.activation_dtype.name());
    if let Some(folder) = &settings.packed_cache {
        args.flag("--packed-cache", folder);
    }
    args.flag("--num-threads", plan.threads.count.to_string());
    if let Some(bytes) = plan.kept_bytes(settings) {
        args.flag("--kv-cache-bytes", bytes.to_string());
    }
    args.flag("--adapter-bytes", plan.adapter_bytes.to_string());
    args.flag("--page-tokens", plan.kv_cache.page_tokens.to_string());
    args.word("--json-output");

    let known = Args::variables();
    let inherited = environment.variables.iter().filter(|(name, _)| {
        name.to_str().is_some_and(|name| {
            is_forwarded_to_shards(name) && !known.iter().any(|flag| flag == name)
        })
    });
    let mut variables: Vec<_> = inherited.cloned().collect();
    // Everything a shard reads lies in folders by now.
    set(&mut variables, "HF_HUB_OFFLINE", "1");
    // Threads that spin after one operator hold up the kernels' own, which run next.
    if !variables.iter().any(|(name, _)| name == "OMP_WAIT_POLICY") {
        set(&mut variables, "OMP_WAIT_POLICY", "passive");
    }
    Invocation {
        program: environment.programs.join(SERVER),
        args: args.0,
        variables,
        processors: plan.threads.of_rank(rank).to_vec(),
    }
}

/// The router. `http` and `control` are the numbers of open files that it inherits.
pub fn router(site: Site<'_>, http: RawFd, control: RawFd) -> Invocation {
    let Site {
        environment,
        settings,
        plan,
        served,
        run,
    } = site;
    let limits = &settings.limits;
    let mut args = Arguments::default();
    args.flag("--http-fd", http.to_string());
    args.flag("--control-fd", control.to_string());
    args.flag("--shard-uds-path", run.join("shard"));
    args.flag("--num-shard", plan.place.shards().to_string());
    args.flag("--tokenizer-name", &served.model);
    args.flag("--model-id", &settings.model_id);
    if let Some(revision) = &settings.revision {
        args.flag("--revision", revision);
    }
    if !served.adapters.is_empty() {
        args.flag("--lora-adapters", adapter_list(served));
    }
    if let Some(folder) = &settings.lora_dir {
        args.flag("--lora-dir", folder);
    }
    if settings.allow_dynamic_lora {
        args.word("--allow-dynamic-lora");
    }
    let sizes = [
        ("--prometheus-port", settings.prometheus_port.map(u32::from)),
        ("--request-timeout", Some(limits.request_timeout)),
        (
            "--max-concurrent-requests",
            Some(limits.max_concurrent_requests),
        ),
        ("--max-input-tokens", Some(plan.max_input_tokens)),
        ("--max-total-tokens", Some(plan.max_total_tokens)),
        (
            "--max-batch-prefill-tokens",
            limits.max_batch_prefill_tokens,
        ),
        ("--max-batch-total-tokens", limits.max_batch_total_tokens),
        ("--max-batch-size", plan.max_batch_size),
        ("--speculate", limits.speculate),
        ("--max-best-of", Some(limits.max_best_of)),
        ("--max-stop-sequences", Some(limits.max_stop_sequences)),
        ("--max-top-n-tokens", Some(limits.max_top_n_tokens)),
        (
            "--max-client-batch-size",
            Some(limits.max_client_batch_size),
        ),
        ("--validation-workers", Some(limits.validation_workers)),
        (
            "--graceful-termination-timeout",
            Some(settings.operation.graceful_termination_timeout),
        ),
    ];
    for (flag, size) in sizes {
        if let Some(size) = size {
            args.flag(flag, size.to_string());
        }
    }
    args.flag("--payload-limit", limits.payload_limit.to_string());
    if limits.share_prefix_cache {
        args.word("--share-prefix-cache");
    }
    if limits.allow_remote_images {
        args.word("--allow-remote-images");
    }
    if let Some(bytes) = limits.max_image_fetch_size {
        args.flag("--max-image-fetch-size", bytes.to_string());
    }
    if !settings.cors_allow_origin.is_empty() {
        args.flag("--cors-allow-origin", settings.cors_allow_origin.join(","));
    }
    if let Some(file) = &settings.api_key_file {
        args.flag("--api-key-file", file);
    }
    if let Some(file) = &settings.admin_api_key_file {
        args.flag("--admin-api-key-file", file);
    }
    args.word("--json-output");

    let known = Args::variables();
    let is_flag = |name: &OsStr| {
        name.to_str()
            .is_some_and(|name| known.iter().any(|flag| flag == name))
    };
    let mut variables: Vec<_> = environment
        .variables
        .iter()
        .filter(|(name, _)| !is_flag(name))
        .cloned()
        .collect();
    let keys = [
        ("API_KEY", &settings.api_key),
        ("ADMIN_API_KEY", &settings.admin_api_key),
    ];
    for (name, key) in keys {
        if let Some(key) = key {
            set(&mut variables, name, key.reveal());
        }
    }
    Invocation {
        program: environment.programs.join(ROUTER),
        args: args.0,
        variables,
        processors: Vec::new(),
    }
}

/// `name=folder;name=folder`, as the router and `inspect` read it.
pub fn adapter_list(served: &Served) -> OsString {
    let mut list = OsString::new();
    for (name, folder) in &served.adapters {
        if !list.is_empty() {
            list.push(";");
        }
        list.push(name);
        list.push("=");
        list.push(folder);
    }
    list
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn word(&mut self, word: impl AsRef<OsStr>) -> &mut Self {
        self.0.push(word.as_ref().to_owned());
        self
    }

    fn flag(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.word(name).word(value);
    }
}

fn set(variables: &mut Vec<(OsString, OsString)>, name: &str, value: impl AsRef<OsStr>) {
    variables.retain(|(key, _)| key != name);
    variables.push((name.into(), value.as_ref().to_owned()));
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::plan::KvCache;
    use crate::threads::Threads;

    fn whole(flags: &[&str], variables: &[(&str, &str)]) -> [Invocation; 2] {
        let variables = variables
            .iter()
            .map(|(key, value)| (key.into(), value.into()))
            .collect();
        let environment = Environment::from_variables(
            variables,
            PathBuf::from("/opt/bin/text-generation-launcher"),
        );
        let args = Args::try_parse_from([&["launcher", "--model-id=org/m"], flags].concat())
            .expect("flags");
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
}
