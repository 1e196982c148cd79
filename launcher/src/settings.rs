//! What the flags mean together: checked once, so that nothing after it can fail on them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;

use crate::adapters::{self, AdapterRequest};
use crate::args::compat::Fate;
use crate::args::{
    ActivationDtype, AdapterSource, Args, Attention, Device, Dtype, Environment, GraphSizes,
    KvCacheDtype, Limits, Operation, Quantize, Secret,
};
use crate::failure::Failure;

/// A checked set of flags.
#[derive(Debug, Clone)]
pub struct Settings {
    pub model_id: String,
    pub revision: Option<String>,
    pub adapters: Vec<AdapterRequest>,
    pub lora_dir: Option<PathBuf>,
    pub allow_dynamic_lora: bool,
    pub default_adapter_source: Option<AdapterSource>,
    pub dtype: Dtype,
    pub kv_cache_dtype: KvCacheDtype,
    pub quantize: Option<Quantize>,
    pub activation_dtype: ActivationDtype,
    pub packed_cache: Option<PathBuf>,
    pub device: Device,
    /// Of a GPU's memory that a model process may take.
    pub cuda_memory_fraction: f32,
    pub cuda_graphs: GraphSizes,
    pub strict_kernels: bool,
    pub attention: Attention,
    /// Number of model processes, where it was said.
    pub num_shard: Option<u32>,
    pub sharded: Option<bool>,
    pub num_threads: Option<u32>,
    pub kv_cache_bytes: Option<u64>,
    pub adapter_bytes: Option<u64>,
    pub limits: Limits,
    pub hostname: String,
    pub port: u16,
    pub prometheus_port: Option<u16>,
    pub cors_allow_origin: Vec<String>,
    pub api_key: Option<Secret>,
    pub api_key_file: Option<PathBuf>,
    pub admin_api_key: Option<Secret>,
    pub admin_api_key_file: Option<PathBuf>,
    pub operation: Operation,
    /// Remarks on flags that have no effect, or another one than elsewhere.
    pub remarks: Vec<String>,
}

impl Settings {
    /// Checks the flags against each other; looks at the file system only to tell a folder from a repository's name.
    pub fn check(args: Args, environment: &Environment) -> Result<Self, Failure> {
        let mut remarks = fates(&args)?;
        let Args {
            model,
            sharding,
            mut limits,
            network,
            operation,
            ..
        } = args;
        let model_id = model.model_id.or_else(|| environment.get("HF_MODEL_ID")).ok_or_else(|| {
            Failure::config("no model was named; pass --model-id with a folder or the name of a repository on the hub")
        })?;
        let quantize = match model.quantize {
            None => from_variable(environment, "HF_MODEL_QUANTIZE", |text| {
                Quantize::from_str(text, true)
            })?,
            set => set,
        };
        refuse_formats(quantize)?;

        let list = model
            .lora_ids
            .or_else(|| environment.get("LORA_ADAPTERS"))
            .unwrap_or_default();
        let adapters = adapters::parse(&list, |path| Path::new(path).is_dir())?;
        if let Some(missing) = model.lora_dir.as_ref().filter(|path| !path.is_dir()) {
            return Err(Failure::config(format!(
                "--lora-dir {}: there is no such folder",
                missing.display()
            )));
        }
        let missing = match model.default_adapter_source {
            Some(AdapterSource::Hub) if !model.allow_dynamic_lora => Some("--allow-dynamic-lora"),
            Some(AdapterSource::Local) if model.lora_dir.is_none() => Some("--lora-dir"),
            _ => None,
        };
        if let (Some(source), Some(flag)) = (model.default_adapter_source, missing) {
            return Err(Failure::config(format!(
                "--default-adapter-source {} needs {flag}, which allows what it asks for; pass it too",
                source.name()
            )));
        }
        let num_shard = match sharding.num_shard {
            None => from_variable(environment, "SM_NUM_GPUS", |text| {
                text.parse().map_err(|_| String::new())
            })?,
            set => set,
        };
        if limits.max_input_tokens.is_none() {
            limits.max_input_tokens = from_variable(environment, "MAX_INPUT_LENGTH", |text| {
                text.parse().map_err(|_| String::new())
            })?;
        }
        check_lengths(&limits)?;

        let hostname = match network.hostname.or_else(|| environment.hostname.clone()) {
            Some(hostname) => hostname,
            None => {
                remarks.push(format!(
                    "listens on {LOOPBACK} only; --hostname 0.0.0.0 opens it to the network"
                ));
                LOOPBACK.to_owned()
            }
        };
        let protected = network.api_key.is_some()
            || network.api_key_file.is_some()
            || network.allow_unauthenticated;
        if !protected && !is_loopback(&hostname) {
            return Err(Failure::config(format!(
                "--hostname {hostname} can be reached from other machines and no API key is set; set API_KEY or \
                 --api-key-file, or pass --allow-unauthenticated"
            )));
        }
        Ok(Self {
            model_id,
            revision: model
                .revision
                .or_else(|| environment.get("HF_MODEL_REVISION")),
            adapters,
            lora_dir: model.lora_dir,
            allow_dynamic_lora: model.allow_dynamic_lora,
            default_adapter_source: model.default_adapter_source,
            dtype: model.dtype.unwrap_or(Dtype::Auto),
            kv_cache_dtype: model.kv_cache_dtype.unwrap_or(KvCacheDtype::Auto),
            quantize,
            activation_dtype: model.activation_dtype.unwrap_or(ActivationDtype::Auto),
            packed_cache: model.packed_cache,
            device: sharding.device,
            cuda_memory_fraction: sharding.cuda_memory_fraction,
            cuda_graphs: sharding.cuda_graphs,
            strict_kernels: sharding.strict_kernels,
            attention: sharding.attention,
            num_shard,
            sharded: sharding.sharded,
            num_threads: sharding.num_threads,
            kv_cache_bytes: sharding.kv_cache_bytes,
            adapter_bytes: sharding.adapter_bytes,
            limits,
            hostname,
            port: network.port,
            prometheus_port: network.prometheus_port,
            cors_allow_origin: network.cors_allow_origin,
            api_key: network.api_key,
            api_key_file: network.api_key_file,
            admin_api_key: network.admin_api_key,
            admin_api_key_file: network.admin_api_key_file,
            operation,
            remarks,
        })
    }
}

const LOOPBACK: &str = "127.0.0.1";

fn fates(args: &Args) -> Result<Vec<String>, Failure> {
    let fates = [args.compat.fates(), args.lorax.fates()].concat();
    if let Some(Fate::Refused { flag, reason }) = fates
        .iter()
        .find(|fate| matches!(fate, Fate::Refused { .. }))
    {
        return Err(Failure::config(format!(
            "{flag} is not supported: {reason}"
        )));
    }
    let remark = |fate| match fate {
        Fate::Accepted { flag, remark } => format!("{flag} has no effect: {remark}"),
        Fate::Refused { flag, reason } => format!("{flag}: {reason}"),
    };
    Ok(fates.into_iter().map(remark).collect())
}

fn from_variable<T, E>(
    environment: &Environment,
    name: &str,
    parse: impl Fn(&str) -> Result<T, E>,
) -> Result<Option<T>, Failure> {
    let Some(text) = environment.get(name) else {
        return Ok(None);
    };
    match parse(&text) {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(Failure::config(format!(
            "the environment variable {name} is `{text}`, which it cannot be"
        ))),
    }
}

fn refuse_formats(quantize: Option<Quantize>) -> Result<(), Failure> {
    if quantize == Some(Quantize::Exl2) {
        return Err(Failure::config(
            "--quantize exl2 is not supported: the format needs kernels that exist for no processor; use a gptq or awq \
             version of the model",
        ));
    }
    Ok(())
}

fn check_lengths(limits: &Limits) -> Result<(), Failure> {
    match (limits.max_input_tokens, limits.max_total_tokens) {
        (Some(input), Some(total)) if input >= total => Err(Failure::config(format!(
            "--max-input-tokens {input} leaves no room for an answer within --max-total-tokens {total}; make it less"
        ))),
        _ => Ok(()),
    }
}

fn is_loopback(hostname: &str) -> bool {
    match IpAddr::from_str(hostname) {
        Ok(address) => address.is_loopback(),
        Err(_) => hostname == "localhost",
    }
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
