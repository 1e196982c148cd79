use clap::Parser;

use super::*;
use crate::args::{Args, Environment};
use crate::inspection::{AdapterFacts, ModelFacts};
use crate::machine::Gpu;
use crate::processors::Processors;

/// The two adapters below, a quarter for what a shard adds, and one to spare.
const ADAPTERS: u64 = 30 * MIB + 30 * MIB / 4 + MIB;

fn settings(flags: &[&str]) -> Settings {
    let args =
        Args::try_parse_from([&["text-generation-launcher", "--model-id=m"], flags].concat())
            .expect("flags");
    Settings::check(args, &Environment::default()).expect("settings")
}

fn machine(memory: u64) -> Machine {
    Machine {
        processors: Processors {
            cores: (0..8).map(|core| vec![core]).collect(),
            granted_millis: None,
        },
        memory_total: memory,
        memory_available: memory,
        ..Machine::default()
    }
}

/// The plan where flags and machine alone decide the place.
fn make(settings: &Settings, machine: &Machine, inspection: &Inspection) -> Result<Plan, Failure> {
    let place = Place::choose(settings, machine)?;
    let threads = Threads::choose(settings.num_threads, &machine.processors, &place)?;
    super::make(settings, machine, place, threads, inspection)
}

/// A model of 2 GiB whose token takes 64 KiB of KV cache.
fn inspection() -> Inspection {
    let model = ModelFacts {
        architecture: "LlamaForCausalLM".into(),
        parameters: 1 << 30,
        dtype: "bfloat16".into(),
        rank_weight_bytes: 2 * GIB,
        kv_dtype: "bfloat16".into(),
        page_bytes: MIB,
        page_tokens: 16,
        slot_bytes: 0,
        max_positions: Some(8192),
    };
    let adapter = |name: &str, bytes| AdapterFacts {
        name: name.into(),
        bytes,
        rank_min: 8,
        rank_max: 16,
    };
    Inspection {
        model,
        adapters: vec![adapter("a", 10 * MIB), adapter("b", 20 * MIB)],
    }
}

#[test]
fn a_roomy_machine_holds_every_request_at_its_usual_length() {
    let plan = make(&settings(&[]), &machine(64 * GIB), &inspection()).expect("a plan");
    assert_eq!(
        (plan.place.shards(), plan.threads.count, plan.adapter_bytes),
        (1, 8, ADAPTERS)
    );
    assert_eq!((plan.max_total_tokens, plan.max_input_tokens), (8192, 8191));
    assert_eq!(plan.kv_cache.tokens(), 128 * 2048);
}

#[test]
fn the_parts_never_exceed_the_machine() {
    for gibibytes in 4..40 {
        for shards in ["1", "2", "3"] {
            let machine = machine(gibibytes * GIB);
            let Ok(plan) = make(&settings(&["--num-shard", shards]), &machine, &inspection())
            else {
                continue;
            };
            let cache = plan.kv_cache;
            let one = plan.weight_bytes + plan.adapter_bytes + plan.overhead_bytes + cache.bytes;
            assert!(
                one * u64::from(plan.place.shards()) <= machine.memory_available,
                "{plan:?}"
            );
            assert!(cache.tokens() >= u64::from(plan.max_total_tokens));
            assert!(plan.max_input_tokens < plan.max_total_tokens);
        }
    }
}

#[test]
fn a_small_machine_shortens_the_window_and_says_so() {
    let plan = make(&settings(&[]), &machine(3 * GIB + 300 * MIB), &inspection()).expect("a plan");
    assert!(plan.max_total_tokens < 8192, "{plan:?}");
    assert_eq!(plan.remarks.len(), 1);
}

#[test]
fn a_window_that_was_asked_for_is_never_shortened() {
    let failure = make(
        &settings(&["--max-total-tokens=8192"]),
        &machine(3 * GIB + 300 * MIB),
        &inspection(),
    );
    let failure = failure.expect_err("too little memory");
    assert_eq!(failure.code, Code::Memory);
    assert!(
        failure.message.contains("512 MiB") && failure.message.contains("8192"),
        "{failure}"
    );
}

#[test]
fn a_model_larger_than_memory_is_refused_in_numbers() {
    let failure = make(&settings(&[]), &machine(2 * GIB), &inspection()).expect_err("too large");
    assert_eq!(failure.code, Code::Memory);
    assert!(
        failure.message.contains("2.00 GiB") && failure.message.contains("1.50 GiB"),
        "{failure}"
    );
}

#[test]
fn a_kv_cache_beyond_memory_is_refused() {
    let failure = make(
        &settings(&["--kv-cache-bytes=60GiB"]),
        &machine(16 * GIB),
        &inspection(),
    )
    .expect_err("too large");
    assert_eq!(failure.code, Code::Memory);
    let plan = make(
        &settings(&["--kv-cache-bytes=1GiB"]),
        &machine(16 * GIB),
        &inspection(),
    )
    .expect("a plan");
    assert_eq!(plan.kv_cache.pages, 1024);
}

#[test]
fn a_window_longer_than_the_model_is_refused() {
    let failure = make(
        &settings(&["--max-total-tokens=9000"]),
        &machine(64 * GIB),
        &inspection(),
    )
    .expect_err("too long");
    assert_eq!(failure.code, Code::Config);
    assert!(failure.message.contains("8192"), "{failure}");
}

#[test]
fn threads_are_shared_out_over_the_processes() {
    let threads = |flags: &[&str]| {
        make(&settings(flags), &machine(64 * GIB), &inspection())
            .expect("a plan")
            .threads
            .count
    };
    assert_eq!(threads(&["--num-shard=2"]), 4);
    assert_eq!(threads(&["--num-shard=16"]), 1);
    assert_eq!(threads(&["--num-threads=3"]), 3);
}

#[test]
fn room_for_loading_adapters_is_kept_when_clients_may_load_them() {
    let plan = make(
        &settings(&["--allow-dynamic-lora"]),
        &machine(64 * GIB),
        &inspection(),
    )
    .expect("a plan");
    assert_eq!(plan.adapter_bytes, ADAPTERS + 256 * MIB);
}

/// A machine with two GPUs, one of them half taken.
fn with_gpus() -> Machine {
    let gpu = |free| Gpu {
        memory_total: 24 * GIB,
        memory_available: free,
        ..Gpu::default()
    };
    Machine {
        gpus: vec![gpu(23 * GIB), gpu(12 * GIB)],
        ..machine(4 * GIB)
    }
}

#[test]
fn a_model_on_gpus_is_planned_by_the_memory_of_the_fullest() {
    let plan = make(&settings(&[]), &with_gpus(), &inspection()).expect("a plan");
    assert_eq!(plan.place, Place::Cuda(with_gpus().gpus));
    let left = 12 * GIB - 2 * GIB - ADAPTERS - GPU_OVERHEAD_BYTES;
    assert_eq!(
        plan.kv_cache.pages,
        (left as f64 * GPU_KV_SHARE) as u64 / MIB
    );
    let alone = make(&settings(&["--num-shard=1"]), &with_gpus(), &inspection()).expect("a plan");
    assert!(alone.kv_cache.pages > plan.kv_cache.pages);
}

#[test]
fn a_share_of_a_gpu_bounds_what_is_planned_there() {
    let plan = |share| make(&settings(&[share]), &with_gpus(), &inspection());
    let (quarter, most) = (
        plan("--cuda-memory-fraction=0.25"),
        plan("--cuda-memory-fraction=1"),
    );
    let left = 6 * GIB - 2 * GIB - ADAPTERS - GPU_OVERHEAD_BYTES;
    let quarter = quarter.expect("a plan").kv_cache;
    assert_eq!(quarter.pages, (left as f64 * GPU_KV_SHARE) as u64 / MIB);
    assert!(quarter.pages < most.expect("a plan").kv_cache.pages);
    let failure = plan("--cuda-memory-fraction=0.1").expect_err("a refusal");
    assert!(
        failure.message.contains("2.40 GiB of GPU memory"),
        "{failure}"
    );
}

#[test]
fn a_shard_on_a_gpu_measures_what_is_left_for_pages_unless_a_number_was_asked_for() {
    let kept = |flags: &[&str], machine: &Machine| {
        let settings = settings(flags);
        let plan = make(&settings, machine, &inspection()).expect("a plan");
        plan.kept_bytes(&settings)
    };
    assert_eq!(kept(&[], &with_gpus()), None);
    assert_eq!(kept(&["--kv-cache-bytes=1GiB"], &with_gpus()), Some(GIB));
    assert_eq!(
        kept(&["--kv-cache-bytes=1GiB"], &machine(8 * GIB)),
        Some(GIB)
    );
    assert!(kept(&[], &machine(8 * GIB)).is_some());
}

#[test]
fn sizes_of_graphs_are_explained_where_there_is_no_gpu() {
    let told = |flags: &[&str], machine: &Machine| {
        let plan = make(&settings(flags), machine, &inspection()).expect("a plan");
        let about = |remark: &&String| remark.starts_with("--cuda-graphs has no effect");
        plan.remarks.iter().filter(about).count()
    };
    assert_eq!(told(&["--cuda-graphs=1,3"], &machine(8 * GIB)), 1);
    assert_eq!(told(&["--cuda-graphs=0"], &machine(8 * GIB)), 1);
    assert_eq!(told(&[], &machine(8 * GIB)), 0);
    assert_eq!(told(&["--cuda-graphs=1,3"], &with_gpus()), 0);
}

#[test]
fn a_machine_with_gpus_that_are_not_wanted_is_planned_by_its_main_memory() {
    let machine = Machine {
        gpus: with_gpus().gpus,
        ..machine(64 * GIB)
    };
    let plan = make(&settings(&["--device=cpu"]), &machine, &inspection()).expect("a plan");
    let without = make(&settings(&[]), &self::machine(64 * GIB), &inspection());
    assert_eq!(plan, without.expect("a plan"));
}

#[test]
fn sizes_are_readable() {
    assert_eq!(
        [512, 2048, 10 * MIB, 3 * GIB / 2].map(size),
        ["512 B", "2.00 KiB", "10.0 MiB", "1.50 GiB"]
    );
}

/// A model whose sequences keep a state of 64 MiB each and no pages.
fn recurrent() -> Inspection {
    let mut inspection = inspection();
    inspection.model.page_bytes = 0;
    inspection.model.slot_bytes = 64 * MIB;
    inspection.model.max_positions = None;
    inspection
}

#[test]
fn a_step_of_a_recurrent_model_has_as_many_rows_as_states_fit() {
    let roomy = make(&settings(&[]), &machine(64 * GIB), &recurrent()).expect("a plan");
    assert_eq!(
        (roomy.max_batch_size, roomy.state_bytes),
        (Some(128), 128 * 64 * MIB)
    );
    assert_eq!((roomy.kv_cache.bytes, roomy.max_total_tokens), (0, 4096));
    let flags = settings(&["--kv-cache-dtype=int8"]);
    let told = make(&flags, &machine(64 * GIB), &recurrent()).expect("a plan");
    let of_format = |remark: &String| remark.contains("--kv-cache-dtype int8");
    assert!(told.remarks.iter().any(of_format) && !roomy.remarks.iter().any(of_format));
    assert!(roomy.kv_cache.tokens() >= 128 * 4096);
    let narrow = make(&settings(&[]), &machine(8 * GIB), &recurrent()).expect("a plan");
    let rows = narrow.max_batch_size.expect("bounded by memory");
    assert!((1..128).contains(&rows) && narrow.state_bytes == u64::from(rows) * 64 * MIB);
    assert!(
        narrow
            .remarks
            .iter()
            .any(|remark| remark.contains("recurrent states"))
    );
    let asked = make(
        &settings(&["--kv-cache-bytes=1GiB", "--max-batch-size=16"]),
        &machine(8 * GIB),
        &recurrent(),
    )
    .expect("a plan");
    assert_eq!((asked.max_batch_size, asked.state_bytes), (Some(16), GIB));
}

#[test]
fn more_rows_than_states_fit_are_refused() {
    let failure = make(
        &settings(&["--max-batch-size=1000"]),
        &machine(8 * GIB),
        &recurrent(),
    )
    .expect_err("too many");
    assert_eq!(failure.code, Code::Memory);
    assert!(
        failure.to_string().contains("--max-batch-size"),
        "{failure}"
    );
}
