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
    if let Some(source) = settings.default_adapter_source {
        args.flag("--default-adapter-source", source.name());
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
    args.flag("--overlap", limits.overlap.name());
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
#[path = "commands_tests.rs"]
mod tests;
