//! Prints a plan for people.

use crate::commands::{self, Invocation, Site};
use crate::inspection::{AdapterFacts, Inspection};
use crate::machine::Machine;
use crate::place::Place;
use crate::plan::{Plan, size};
use crate::processors::list;
use crate::settings::Settings;

/// The model, the machine, the memory of each process and the limits of a request.
pub fn render(
    settings: &Settings,
    machine: &Machine,
    inspection: &Inspection,
    plan: &Plan,
) -> String {
    let model = &inspection.model;
    let mut lines = vec![
        row(
            "model",
            &format!(
                "{} · {} · {} parameters · {}{}",
                settings.model_id,
                model.architecture,
                count(model.parameters),
                model.dtype,
                settings
                    .quantize
                    .map(|format| format!(" · {}", format.name()))
                    .unwrap_or_default(),
            ),
        ),
        row(
            "adapters",
            &match inspection.adapters.as_slice() {
                [] => "none".to_owned(),
                adapters => adapters.iter().map(adapter).collect::<Vec<_>>().join(" · "),
            },
        ),
    ];
    lines.push(row(
        "machine",
        &format!(
            "{} · {} · {} of {} available",
            if machine.processor.is_empty() {
                "unknown processor"
            } else {
                &machine.processor
            },
            machine.processors.describe(),
            size(machine.memory_available),
            size(machine.memory_total),
        ),
    ));
    for (index, gpu) in machine.gpus.iter().enumerate() {
        let memory = format!(
            "{} of {} available",
            size(gpu.memory_available),
            size(gpu.memory_total)
        );
        let used = match &plan.place {
            Place::Cuda(used) if index < used.len() => format!("shard-{index}"),
            _ => "not used".to_owned(),
        };
        lines.push(row("", &format!("{} · {memory} · {used}", gpu.name)));
    }
    lines.push(row(
        "processes",
        &format!(
            "router · {} with {} each{}",
            plural(u64::from(plan.place.shards()), "shard"),
            plural(u64::from(plan.threads.count), "thread"),
            kept(&plan.threads.processors),
        ),
    ));
    lines.extend(memory(plan, &model.kv_dtype));
    lines.push(row(
        "requests",
        &format!(
            "{} at a time · {} tokens each, of which {} for the prompt",
            grouped(u64::from(settings.limits.max_concurrent_requests)),
            grouped(u64::from(plan.max_total_tokens)),
            grouped(u64::from(plan.max_input_tokens)),
        ),
    ));
    let remarks = settings.remarks.iter().chain(&plan.remarks);
    lines.extend(
        remarks
            .enumerate()
            .map(|(index, remark)| row(if index == 0 { "remarks" } else { "" }, remark)),
    );
    lines.join("\n") + "\n"
}

/// The processes and their arguments. The numbers of the files that the router inherits are examples.
pub fn render_processes(site: Site<'_>) -> String {
    let shards = (0..site.plan.place.shards())
        .map(|rank| (format!("shard-{rank}"), commands::shard(site, rank, 0)));
    let processes =
        std::iter::once(("router".to_owned(), commands::router(site, 3, 4))).chain(shards);
    let lines = processes.map(|(name, Invocation { program, args, .. })| {
        let words: Vec<_> = args
            .iter()
            .map(|word| quoted(&word.to_string_lossy()))
            .collect();
        row(
            &name,
            &format!("{} {}\n", program.display(), words.join(" ")),
        )
    });
    lines.collect()
}

fn memory(plan: &Plan, kv_dtype: &str) -> Vec<String> {
    let cache = plan.kv_cache;
    let pages = format!(
        "{} pages of {} tokens in {kv_dtype}, {} each: {} tokens",
        grouped(cache.pages),
        cache.page_tokens,
        size(cache.bytes / cache.pages.max(1)),
        grouped(cache.tokens())
    );
    let mut parts = vec![
        ("weights", plan.weight_bytes, String::new()),
        ("adapters", plan.adapter_bytes, String::new()),
        ("KV cache", cache.bytes, pages),
        ("to run", plan.overhead_bytes, String::new()),
    ];
    if let Some(rows) = plan.max_batch_size.filter(|_| plan.state_bytes > 0) {
        parts.insert(3, ("states", plan.state_bytes, format!("{rows} sequences")));
    }
    let total: u64 = parts.iter().map(|(_, bytes, _)| *bytes).sum();
    let line = |head: &str, part: &str, amount: String, remark: &str| {
        row(
            head,
            format!("{part:<10} {amount:>10}  {remark}").trim_end(),
        )
    };
    let mut lines: Vec<_> = parts
        .iter()
        .enumerate()
        .map(|(index, (part, bytes, remark))| {
            line(
                if index == 0 { "memory" } else { "" },
                part,
                size(*bytes),
                remark,
            )
        })
        .collect();
    let all = match plan.place.shards() {
        1 => String::new(),
        shards => format!("in each shard, {} in all", size(total * u64::from(shards))),
    };
    lines.push(line("", "total", size(total), &all));
    lines
}

/// Where the ranks compute, in their order.
fn kept(processors: &[Vec<u32>]) -> String {
    let lists: Vec<_> = processors.iter().map(|ranks| list(ranks)).collect();
    match lists.is_empty() {
        true => String::new(),
        false => format!(" · on processors {}", lists.join(" · ")),
    }
}

fn adapter(facts: &AdapterFacts) -> String {
    let rank = match (facts.rank_min, facts.rank_max) {
        (low, high) if low == high => format!("rank {low}"),
        (low, high) => format!("ranks {low} to {high}"),
    };
    format!("{} ({rank}, {})", facts.name, size(facts.bytes))
}

fn row(head: &str, text: &str) -> String {
    format!("{head:<10} {text}")
}

fn plural(number: u64, word: &str) -> String {
    format!("{number} {word}{}", if number == 1 { "" } else { "s" })
}

fn count(number: u64) -> String {
    match number {
        1_000_000_000.. => format!("{:.2}B", number as f64 / 1e9),
        1_000_000.. => format!("{:.1}M", number as f64 / 1e6),
        _ => grouped(number),
    }
}

fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let cut = |(index, digit): (usize, char)| {
        let comma = index > 0 && (digits.len() - index).is_multiple_of(3);
        [comma.then_some(','), Some(digit)]
    };
    digits.chars().enumerate().flat_map(cut).flatten().collect()
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(grouped),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [999_999, 3_400_000, 1_240_000_000].map(count),
            ["999,999", "3.4M", "1.24B"]
        );
    }

    #[test]
    fn words_of_a_command_can_be_pasted_into_a_shell() {
        assert_eq!(
            ["--x", "a=b;c=d", "it's", ""].map(quoted),
            ["--x", "'a=b;c=d'", "'it'\\''s'", "''"]
        );
    }
}
