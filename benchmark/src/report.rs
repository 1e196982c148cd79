//! Writes the figures for a terminal, a page or a program.

use serde_json::{Value, json};

use crate::args::{Args, Output};
use crate::stats::{Figures, Spread};

/// The figures in the wanted form, with a line's end.
pub fn render(output: Output, args: &Args, figures: &[Figures]) -> String {
    match output {
        Output::Table => table(&rows(figures), "  ", None),
        Output::Markdown => markdown(args, figures),
        Output::Json => document(args, figures).to_string() + "\n",
    }
}

/// The names of the columns.
pub const COLUMNS: [&str; 12] = [
    "batch",
    "requests",
    "failed",
    "prompt",
    "tokens/s",
    "requests/s",
    "TTFT p50",
    "p90",
    "p99",
    "ITL p50",
    "p90",
    "p99",
];

/// One line of cells for each measurement; times in milliseconds.
pub fn rows(figures: &[Figures]) -> Vec<Vec<String>> {
    let cells = |figures: &Figures| {
        let times = [figures.first_token, figures.between_tokens];
        let times = times
            .iter()
            .flat_map(|spread| [spread.p50, spread.p90, spread.p99])
            .map(|time| format!("{time:.2}"));
        let prompt = figures.prompt_tokens as f64 / figures.requests.max(1) as f64;
        [
            figures.batch_size.to_string(),
            figures.requests.to_string(),
            figures.failures.to_string(),
            format!("{prompt:.1}"),
            format!("{:.1}", figures.token_rate()),
            format!("{:.2}", figures.request_rate()),
        ]
        .into_iter()
        .chain(times)
        .collect()
    };
    figures.iter().map(cells).collect()
}

fn table(rows: &[Vec<String>], between: &str, rule: Option<&str>) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].len());
        cells
            .chain([COLUMNS[column].len()])
            .max()
            .unwrap_or_default()
    };
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<_> = cells
            .enumerate()
            .map(|(column, cell)| format!("{cell:>0$}", width(column)))
            .collect();
        padded.join(between)
    };
    let mut lines = vec![line(&mut COLUMNS.iter().copied())];
    lines.extend(rule.map(|rule| line(&mut std::iter::repeat_n(rule, COLUMNS.len()))));
    lines.extend(
        rows.iter()
            .map(|row| line(&mut row.iter().map(String::as_str))),
    );
    match rule {
        Some(_) => lines.iter().map(|line| format!("| {line} |\n")).collect(),
        None => lines.join("\n") + "\n",
    }
}

fn markdown(args: &Args, figures: &[Figures]) -> String {
    format!(
        "Prompts of {} tokens, answers of {}, {} requests by each caller. Times in milliseconds; TTFT is the time to the \
         first token, ITL the time between tokens.\n\n{}",
        args.sequence_length,
        args.decode_length,
        args.runs,
        table(&rows(figures), " | ", Some("--:")),
    )
}

fn document(args: &Args, figures: &[Figures]) -> Value {
    let spread = |spread: &Spread| {
        json!({
            "average": spread.average, "low": spread.low, "high": spread.high,
            "p50": spread.p50, "p90": spread.p90, "p99": spread.p99,
        })
    };
    let measurement = |figures: &Figures| {
        json!({
            "batch_size": figures.batch_size,
            "requests": figures.requests,
            "failures": figures.failures,
            "first_failure": figures.reason,
            "seconds": figures.seconds,
            "prompt_tokens": figures.prompt_tokens,
            "generated_tokens": figures.tokens,
            "tokens_per_second": figures.token_rate(),
            "requests_per_second": figures.request_rate(),
            "time_to_first_token_ms": spread(&figures.first_token),
            "time_between_tokens_ms": spread(&figures.between_tokens),
            "request_ms": spread(&figures.request),
        })
    };
    json!({
        "url": args.url,
        "sequence_length": args.sequence_length,
        "decode_length": args.decode_length,
        "runs": args.runs,
        "rate": args.rate,
        "adapters": args.adapters,
        "measurements": figures.iter().map(measurement).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::stats::{Sample, summarize};
    use std::time::Duration;

    fn figures() -> Vec<Figures> {
        let at = Duration::from_millis;
        let sample = Sample {
            sent: at(0),
            events: vec![at(10), at(30)],
            ended: at(40),
            prompt_tokens: 12,
            tokens: 2,
        };
        vec![
            summarize(1, &[sample], &[]),
            summarize(32, &[], &["429 Too Many Requests".to_owned()]),
        ]
    }

    fn written(output: Output) -> String {
        render(
            output,
            &Args::parse_from(["text-generation-benchmark"]),
            &figures(),
        )
    }

    #[test]
    fn columns_line_up() {
        let text = written(Output::Table);
        let lengths: Vec<_> = text.lines().map(str::len).collect();
        assert_eq!(lengths.len(), 3);
        assert!(lengths.iter().all(|length| *length == lengths[0]), "{text}");
        assert!(text.contains("50.0") && text.contains("20.00"), "{text}");
    }

    #[test]
    fn a_page_gets_a_table() {
        let text = written(Output::Markdown);
        let cells: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| line.matches('|').count())
            .collect();
        assert_eq!(cells, [13; 4]);
    }

    #[test]
    fn a_program_gets_every_figure() {
        let document: Value = serde_json::from_str(&written(Output::Json)).expect("JSON");
        assert_eq!(document["measurements"][0]["tokens_per_second"], 50.0);
        assert_eq!(
            document["measurements"][0]["time_to_first_token_ms"]["p99"],
            10.0
        );
        assert_eq!(
            document["measurements"][1]["first_failure"],
            "429 Too Many Requests"
        );
    }
}
