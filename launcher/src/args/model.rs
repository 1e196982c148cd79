//! Flags that say what is served, and over how many processes.

use std::fmt;
use std::path::PathBuf;

use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};

/// The model and its adapters.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct Model {
    /// A folder, a GGUF file, or the name of a repository on the hub, such as `meta-llama/Llama-3.2-1B`; `name:Q4_K_M`
    /// for one GGUF file of several
    #[arg(long, env, hide_env_values = true)]
    pub model_id: Option<String>,

    /// Branch, tag or commit of the model's repository
    #[arg(long, env, hide_env_values = true)]
    pub revision: Option<String>,

    /// Adapters to load: a `;` or `,` list of folder, repository, `repository@revision` or `name=any of these`.
    /// Quote a list that holds `;`, or the shell will cut it there
    #[arg(
        long,
        env,
        visible_alias = "lora-adapters",
        value_name = "LIST",
        hide_env_values = true
    )]
    pub lora_ids: Option<String>,

    /// Folder beneath which adapters may be loaded over HTTP
    #[arg(long, env, hide_env_values = true)]
    pub lora_dir: Option<PathBuf>,

    /// Let clients have adapters downloaded from the hub and loaded
    #[arg(long, env, value_parser = FalseyValueParser::new())]
    pub allow_dynamic_lora: bool,

    /// Where an adapter that is not loaded is loaded from when a request asks for it and does not say: `hub` needs
    /// --allow-dynamic-lora, `local` --lora-dir [default: nowhere, such a request is answered with 404]
    #[arg(long, env, value_enum)]
    pub default_adapter_source: Option<AdapterSource>,

    /// Number format of weights and activations [default: that of the checkpoint]
    #[arg(long, env, value_enum)]
    pub dtype: Option<Dtype>,

    /// Number format of the KV cache [default: that of --dtype]
    #[arg(long, env, value_enum)]
    pub kv_cache_dtype: Option<KvCacheDtype>,

    /// How the weights are quantized
    #[arg(long, env, value_enum)]
    pub quantize: Option<Quantize>,

    /// Number format of what is multiplied with quantized weights [default: that of --dtype]
    #[arg(long, env, value_enum)]
    pub activation_dtype: Option<ActivationDtype>,

    /// Folder that keeps the weights as the kernels read them: the next start only reads them back
    #[arg(long, env, value_name = "DIR")]
    pub packed_cache: Option<PathBuf>,
}

/// How the model is spread over processes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sharding")]
pub struct Sharding {
    /// What model processes compute on: `auto` takes GPUs where there are some, one for each process
    #[arg(long, env = "KVRUN_DEVICE", value_enum, default_value = "auto")]
    pub device: Device,

    /// Number of tensor-parallel model processes [default: the GPUs that CUDA_VISIBLE_DEVICES leaves visible; 1 on the CPU]
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub num_shard: Option<u32>,

    /// `false`: one process, whatever number of GPUs there is
    #[arg(long, env)]
    pub sharded: Option<bool>,

    /// Threads of each model process [default: the physical cores that affinity masks and quotas leave, shared out]. With as
    /// many as there are cores, each has a core of its own
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub num_threads: Option<u32>,

    /// Memory for the KV cache of each model process, such as `2GiB` [default: what the plan finds free]
    #[arg(long, env, value_parser = super::limits::bytes)]
    pub kv_cache_bytes: Option<u64>,

    /// Share of each GPU's memory that its model process may take
    #[arg(long, env, default_value_t = 1.0, value_parser = share)]
    pub cuda_memory_fraction: f32,

    /// Numbers of rows whose decoding steps are captured as CUDA graphs, with adapters and without; `0` captures none
    #[arg(long, env, default_value_t, value_parser = graph_sizes)]
    pub cuda_graphs: GraphSizes,

    /// Refuse to start where an op would be served by plain PyTorch for want of a kernel
    #[arg(long, env, value_parser = FalseyValueParser::new())]
    pub strict_kernels: bool,

    /// What computes attention on GPUs: `auto` takes FlashInfer where it is installed and knows the GPU
    #[arg(long, env, value_enum, default_value = "auto")]
    pub attention: Attention,

    /// The host's memory for adapters in each model process; on GPUs they lie in pages of the KV cache as well while they are used
    /// [default: those of --lora-ids; as much again, and 256MiB at least, where clients may load more]
    #[arg(long, env, value_parser = super::limits::bytes)]
    pub adapter_bytes: Option<u64>,
}

/// Numbers of rows, none where no step is to be captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GraphSizes(pub Vec<u32>);

impl Default for GraphSizes {
    /// Those of text-generation-inference.
    fn default() -> Self {
        Self(vec![1, 2, 4, 8, 16, 32])
    }
}

impl fmt::Display for GraphSizes {
    /// As they are written on a command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: Vec<String> = self.0.iter().map(u32::to_string).collect();
        match sizes.is_empty() {
            true => f.write_str("0"),
            false => f.write_str(&sizes.join(",")),
        }
    }
}

fn graph_sizes(text: &str) -> Result<GraphSizes, String> {
    if text.trim() == "0" {
        return Ok(GraphSizes(Vec::new()));
    }
    let size = |word: &str| match word.trim().parse::<u32>() {
        Ok(rows) if rows > 0 => Ok(rows),
        _ => Err(format!(
            "`{word}` is no number of rows; write numbers above 0 with commas between them, or `0` alone to capture none"
        )),
    };
    Ok(GraphSizes(
        text.split(',').map(size).collect::<Result<_, _>>()?,
    ))
}

fn share(text: &str) -> Result<f32, String> {
    let number = text.parse::<f32>().ok();
    number
        .filter(|share| *share > 0.0 && *share <= 1.0)
        .ok_or_else(|| format!("`{text}` is no share; write a number above 0, at most 1"))
}

/// What model processes compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// GPUs where there are some, else the CPU.
    Auto,
    Cpu,
    Cuda,
}

/// What computes attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Attention {
    /// FlashInfer where it is installed and knows the GPU, else kv.run's own kernels.
    Auto,
    /// FlashInfer; layers that it has no kernel for are computed by kv.run's own.
    Flashinfer,
    /// kv.run's own kernels, which text-generation-inference's `paged` and `flashdecoding` stand for too.
    #[value(aliases = ["paged", "flashdecoding"])]
    Native,
}

/// Whether the next step is planned and sent while the model computes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Overlap {
    /// Where the model does not compute on the CPU.
    Auto,
    On,
    Off,
}

/// Where adapters come from that are not loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdapterSource {
    Hub,
    Local,
}

/// Number format of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// That of the checkpoint.
    Auto,
    Float32,
    Bfloat16,
    Float16,
}

/// Number format of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDtype {
    /// That of the activations.
    Auto,
    Float32,
    Bfloat16,
    Float16,
    /// 8-bit floats with 3 bits of fraction
    #[value(name = "fp8_e4m3fn")]
    Fp8E4m3fn,
    /// 8-bit floats with 2 bits of fraction
    #[value(name = "fp8_e5m2")]
    Fp8E5m2,
    /// 8-bit integers and a scale for each key and value
    Int8,
}

/// Number format of what is multiplied with quantized weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ActivationDtype {
    /// That of the activations.
    Auto,
    /// 8-bit integers and a scale for each group of inputs: faster and not exact, for weights of integer codes on CPUs
    Int8,
    /// 8-bit floats and a scale for each row: faster and not exact, for weights of 8-bit floats on GPUs that multiply them
    Fp8,
}

/// How the weights are quantized; the names are those of text-generation-inference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantize {
    Awq,
    CompressedTensors,
    Eetq,
    Exl2,
    Gptq,
    Marlin,
    Bitsandbytes,
    BitsandbytesNf4,
    BitsandbytesFp4,
    Fp8,
    Gguf,
    /// kv.run's own, made at load: a scale for each output
    Int8,
    /// kv.run's own, made at load: a scale for each 32 inputs
    Int4,
}

macro_rules! named_as_on_the_command_line {
    ($($kind:ty),+) => {$(
        impl $kind {
            /// The value as it is written on a command line.
            pub fn name(self) -> String {
                self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
            }
        }
    )+};
}
named_as_on_the_command_line!(
    AdapterSource,
    Attention,
    Dtype,
    KvCacheDtype,
    ActivationDtype,
    Overlap,
    Quantize
);
