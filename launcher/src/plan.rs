//! What will be started, and with how much memory: a pure function of flags, machine and model.

use crate::args::{GraphSizes, KvCacheDtype};
use crate::failure::{Code, Failure};
use crate::inspection::Inspection;
use crate::machine::Machine;
use crate::place::Place;
use crate::settings::Settings;
use crate::threads::Threads;

/// Sizes that the processes are started with. All are for one model process, in bytes unless named otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub place: Place,
    pub threads: Threads,
    pub weight_bytes: u64,
    pub adapter_bytes: u64,
    pub kv_cache: KvCache,
    /// Recurrent states of the sequences of one step.
    pub state_bytes: u64,
    /// Rows of one step, where it was said or memory bounds it.
    pub max_batch_size: Option<u32>,
    /// Interpreter, libraries and activations.
    pub overhead_bytes: u64,
    pub max_input_tokens: u32,
    pub max_total_tokens: u32,
    /// Consequences that were not asked for in so many words.
    pub remarks: Vec<String>,
}

/// The KV cache of one model process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvCache {
    pub bytes: u64,
    pub pages: u64,
    pub page_tokens: u32,
}

impl KvCache {
    /// Tokens that fit.
    pub fn tokens(&self) -> u64 {
        self.pages * u64::from(self.page_tokens)
    }
}

impl Plan {
    /// The bytes that a shard is told to keep for KV cache and states. On a GPU it measures what is left beside its largest
    /// step, and takes that, unless a number was asked for.
    pub fn kept_bytes(&self, settings: &Settings) -> Option<u64> {
        match self.place {
            Place::Cuda(_) if settings.kv_cache_bytes.is_none() => None,
            _ => Some(self.kv_cache.bytes + self.state_bytes),
        }
    }
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// An idle shard: interpreter, libraries, activations of a step.
const OVERHEAD_BYTES: u64 = 512 * MIB;
/// The same on a GPU: the driver's context, workspaces of libraries, activations and logits of a step.
const GPU_OVERHEAD_BYTES: u64 = 2 * GIB;
/// Left to the router, the system and the cache of files.
const SYSTEM_BYTES: u64 = 512 * MIB;
/// Of what is left after weights and adapters, the most that the KV cache takes on its own account.
const KV_SHARE: f64 = 0.6;
/// The same of a GPU, which nobody else needs.
const GPU_KV_SHARE: f64 = 0.9;
/// The most pages of a model that keeps nothing in them; they only bound how many tokens are planned for.
const FREE_PAGES: u64 = 1 << 20;
/// What a request is taken to need when the KV cache is sized for many of them.
const USUAL_TOKENS: u64 = 2048;
/// Sequences that a recurrent model has states for, when nothing else was said: what the router computes in one step.
const USUAL_ROWS: u64 = 128;
/// Room for adapters that clients may load, when nothing else was said.
const DYNAMIC_ADAPTER_BYTES: u64 = 256 * MIB;
/// The window of a model that does not state one.
const UNSTATED_POSITIONS: u32 = 4096;

/// Sizes everything, or says in numbers why it cannot run here.
pub fn make(
    settings: &Settings,
    machine: &Machine,
    place: Place,
    threads: Threads,
    inspection: &Inspection,
) -> Result<Plan, Failure> {
    let model = &inspection.model;
    let budget = Budget::of(settings, machine, &place);
    let adapter_bytes = settings
        .adapter_bytes
        .unwrap_or_else(|| default_adapter_bytes(settings, inspection));
    let fixed = model.rank_weight_bytes + adapter_bytes + budget.overhead;
    let left = budget
        .bytes
        .checked_sub(fixed)
        .ok_or_else(|| too_large(settings, &budget, model.rank_weight_bytes, adapter_bytes))?;

    let mut remarks: Vec<String> = threads.remark.iter().cloned().collect();
    if matches!(place, Place::Cpu { .. }) && settings.cuda_graphs != GraphSizes::default() {
        remarks.push(
            "--cuda-graphs has no effect: on CPUs, decoding steps are recorded as they come"
                .to_owned(),
        );
    }
    if model.page_bytes == 0 && settings.kv_cache_dtype != KvCacheDtype::Auto {
        remarks.push(format!(
            "--kv-cache-dtype {} changes nothing: {} keeps no keys and values",
            settings.kv_cache_dtype.name(),
            model.architecture
        ));
    }
    let window = model.max_positions.unwrap_or(UNSTATED_POSITIONS);
    let asked = settings.limits.max_total_tokens;
    if let Some(beyond) = asked.filter(|asked| *asked > window && model.max_positions.is_some()) {
        return Err(Failure::config(format!(
            "--max-total-tokens {beyond} is more than the {window} positions of {}; use {window} or less",
            settings.model_id
        )));
    }
    let mut max_total_tokens = asked.unwrap_or(window);
    let (state_bytes, max_batch_size) = size_states(settings, inspection, &budget, left)?;
    let kv_cache = size_kv_cache(
        settings,
        inspection,
        &budget,
        left - state_bytes,
        state_bytes,
        max_total_tokens,
    )?;
    if let Some(rows) = max_batch_size.filter(|_| settings.limits.max_batch_size.is_none()) {
        remarks.push(format!(
            "a step computes {rows} sequences at most, whose recurrent states take {}",
            size(state_bytes)
        ));
    }
    let fits = u32::try_from(kv_cache.tokens()).unwrap_or(u32::MAX);
    if fits < max_total_tokens {
        remarks.push(format!(
            "a request may hold {fits} tokens instead of the model's {max_total_tokens}, because no more fit into memory"
        ));
        max_total_tokens = fits;
    }
    let max_input_tokens = settings
        .limits
        .max_input_tokens
        .unwrap_or(max_total_tokens - 1);
    if max_input_tokens >= max_total_tokens {
        return Err(Failure::config(format!(
            "--max-input-tokens {max_input_tokens} leaves no room for an answer within {max_total_tokens} tokens; make it less"
        )));
    }
    Ok(Plan {
        threads,
        weight_bytes: model.rank_weight_bytes,
        adapter_bytes,
        kv_cache,
        state_bytes,
        max_batch_size,
        overhead_bytes: budget.overhead,
        max_input_tokens,
        max_total_tokens,
        remarks,
        place,
    })
}

/// The memory that one model process has.
struct Budget {
    bytes: u64,
    /// Of them for what is neither weights, adapters nor KV cache.
    overhead: u64,
    /// Of what is left after weights and adapters, the most that the KV cache takes on its own account.
    kv_share: f64,
    /// What such memory is called.
    name: &'static str,
}

impl Budget {
    fn of(settings: &Settings, machine: &Machine, place: &Place) -> Self {
        let name = place.memory();
        match place {
            Place::Cpu { shards } => Self {
                bytes: machine.memory_available.saturating_sub(SYSTEM_BYTES) / u64::from(*shards),
                overhead: OVERHEAD_BYTES,
                kv_share: KV_SHARE,
                name,
            },
            Place::Cuda(gpus) => {
                let share = f64::from(settings.cuda_memory_fraction);
                let usable = gpus.iter().map(|gpu| {
                    let most = (gpu.memory_total as f64 * share) as u64;
                    gpu.memory_available.min(most)
                });
                Self {
                    bytes: usable.min().unwrap_or(0),
                    overhead: GPU_OVERHEAD_BYTES,
                    kv_share: GPU_KV_SHARE,
                    name,
                }
            }
        }
    }

    /// The most of what is `left` that the KV cache takes on its own account.
    fn kv(&self, left: u64) -> u64 {
        (left as f64 * self.kv_share) as u64
    }
}

/// The named adapters, with room for what a shard adds (a matrix that feeds several linears is held by each of them),
/// and room for more of them where clients may load some.
fn default_adapter_bytes(settings: &Settings, inspection: &Inspection) -> u64 {
    let sizes = inspection.adapters.iter().map(|adapter| adapter.bytes);
    let named: u64 = sizes.map(|bytes| bytes + bytes / 4).sum();
    let more = match settings.allow_dynamic_lora || settings.lora_dir.is_some() {
        true => named.max(DYNAMIC_ADAPTER_BYTES),
        false => 0,
    };
    named + more + MIB
}

/// Bytes for the recurrent states of as many sequences as one step computes, and how many those are.
fn size_states(
    settings: &Settings,
    inspection: &Inspection,
    budget: &Budget,
    left: u64,
) -> Result<(u64, Option<u32>), Failure> {
    let (model, asked) = (&inspection.model, settings.limits.max_batch_size);
    if model.slot_bytes == 0 {
        return Ok((0, asked));
    }
    let room = settings.kv_cache_bytes.unwrap_or(budget.kv(left)).min(left);
    // Half of it where there are pages too.
    let room = if model.page_bytes > 0 { room / 2 } else { room };
    let fit = room / model.slot_bytes;
    let rows = asked.map_or(USUAL_ROWS.min(fit), u64::from);
    if rows == 0 || rows > fit {
        return Err(Failure::new(
            Code::Memory,
            format!(
                "the recurrent states of {} sequences take {}, and {} of {} of {} are left for them; lower \
                 --max-batch-size, or use --dtype bfloat16 or a larger machine",
                rows.max(1),
                size(rows.max(1) * model.slot_bytes),
                size(room),
                size(budget.bytes),
                budget.name,
            ),
        ));
    }
    Ok((rows * model.slot_bytes, u32::try_from(rows).ok()))
}

/// `states` are bytes of the same share of memory that something else takes.
fn size_kv_cache(
    settings: &Settings,
    inspection: &Inspection,
    budget: &Budget,
    left: u64,
    states: u64,
    max_total_tokens: u32,
) -> Result<KvCache, Failure> {
    let model = &inspection.model;
    let page_tokens = u64::from(model.page_tokens.max(1));
    let page_bytes = model.page_bytes.max(1);
    let pages_for = |tokens: u64| tokens.div_ceil(page_tokens);
    let one_request = pages_for(u64::from(max_total_tokens));
    let asked_bytes = settings
        .kv_cache_bytes
        .map(|bytes| bytes.saturating_sub(states));
    let pages = match asked_bytes {
        // Pages that nothing is kept in cost nothing: there are as many as could be of use.
        _ if model.page_bytes == 0 => one_request
            .saturating_mul(u64::from(settings.limits.max_concurrent_requests))
            .min(FREE_PAGES),
        Some(bytes) if bytes > left => {
            return Err(too_large(settings, budget, model.rank_weight_bytes, bytes));
        }
        Some(bytes) => bytes / page_bytes,
        None => {
            let usual = u64::from(max_total_tokens).min(USUAL_TOKENS);
            let wanted = match settings.limits.max_batch_total_tokens {
                Some(tokens) => pages_for(u64::from(tokens)),
                None => pages_for(usual)
                    .saturating_mul(u64::from(settings.limits.max_concurrent_requests)),
            };
            wanted.max(one_request).min(budget.kv(left) / page_bytes)
        }
    };
    let asked_too_much = settings.limits.max_total_tokens.is_some() && pages < one_request;
    // Two pages: a prompt and an answer.
    if pages < 2 || asked_too_much {
        return Err(Failure::new(
            Code::Memory,
            format!(
                "the KV cache for one request of {max_total_tokens} tokens takes {}, and {} of {} of {} are left for it; \
                 lower --max-total-tokens",
                size(one_request.max(2) * page_bytes),
                size(asked_bytes.unwrap_or(budget.kv(left))),
                size(budget.bytes),
                budget.name,
            ),
        ));
    }
    Ok(KvCache {
        bytes: pages * model.page_bytes,
        pages,
        page_tokens: model.page_tokens,
    })
}

fn too_large(settings: &Settings, budget: &Budget, weights: u64, more: u64) -> Failure {
    let cure = match settings.quantize {
        None => "a smaller or quantized model, --dtype bfloat16, or a larger machine",
        Some(_) => "a smaller model or a larger machine",
    };
    Failure::new(
        Code::Memory,
        format!(
            "{} needs {} for its weights, {} for adapters and KV cache and {} to run, in each model process; there are {} of \
             {} available to each; use {cure}",
            settings.model_id,
            size(weights),
            size(more),
            size(budget.overhead),
            size(budget.bytes),
            budget.name,
        ),
    )
}

/// An amount of memory for people: three digits and a unit.
pub fn size(bytes: u64) -> String {
    let (number, unit) = match bytes {
        GIB.. => (bytes as f64 / GIB as f64, "GiB"),
        MIB.. => (bytes as f64 / MIB as f64, "MiB"),
        1024.. => (bytes as f64 / 1024.0, "KiB"),
        _ => return format!("{bytes} B"),
    };
    let digits = if number < 10.0 {
        2
    } else if number < 100.0 {
        1
    } else {
        0
    };
    format!("{number:.digits$} {unit}")
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
