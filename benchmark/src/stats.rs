//! From samples to figures. Pure: no clock, no I/O.

use std::time::Duration;

/// One finished request.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// When it was sent, from the start of the measurement.
    pub sent: Duration,
    /// When each event with tokens came, from the start of the measurement, in order.
    pub events: Vec<Duration>,
    /// When the answer was complete, from the start of the measurement.
    pub ended: Duration,
    /// Tokens of the prompt and of the answer, as the server counts them.
    pub prompt_tokens: u64,
    pub tokens: u64,
}

/// The spread of a quantity, in the unit of its values.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Spread {
    pub average: f64,
    pub low: f64,
    pub high: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

/// The figures of one measurement. Times in milliseconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Figures {
    pub batch_size: u32,
    pub requests: usize,
    /// Requests that failed, and the first reason given.
    pub failures: usize,
    pub reason: Option<String>,
    pub seconds: f64,
    pub prompt_tokens: u64,
    pub tokens: u64,
    pub first_token: Spread,
    pub between_tokens: Spread,
    pub request: Spread,
}

impl Figures {
    /// Generated tokens per second, all requests together.
    pub fn token_rate(&self) -> f64 {
        rate(self.tokens as f64, self.seconds)
    }

    /// Answers per second.
    pub fn request_rate(&self) -> f64 {
        rate(self.requests as f64, self.seconds)
    }
}

/// Summarizes the requests of one measurement; `failures` are the reasons of those that failed.
pub fn summarize(batch_size: u32, samples: &[Sample], failures: &[String]) -> Figures {
    let start = samples
        .iter()
        .map(|sample| sample.sent)
        .min()
        .unwrap_or_default();
    let end = samples
        .iter()
        .map(|sample| sample.ended)
        .max()
        .unwrap_or(start);
    let first = samples
        .iter()
        .filter_map(|sample| Some(milliseconds(*sample.events.first()? - sample.sent)));
    let gaps = samples.iter().flat_map(|sample| {
        sample
            .events
            .windows(2)
            .map(|pair| milliseconds(pair[1] - pair[0]))
    });
    Figures {
        batch_size,
        requests: samples.len(),
        failures: failures.len(),
        reason: failures.first().cloned(),
        seconds: (end - start).as_secs_f64(),
        prompt_tokens: samples.iter().map(|sample| sample.prompt_tokens).sum(),
        tokens: samples.iter().map(|sample| sample.tokens).sum(),
        first_token: spread(first.collect()),
        between_tokens: spread(gaps.collect()),
        request: spread(
            samples
                .iter()
                .map(|sample| milliseconds(sample.ended - sample.sent))
                .collect(),
        ),
    }
}

/// The spread of values; all zero where there are none.
pub fn spread(mut values: Vec<f64>) -> Spread {
    values.sort_by(f64::total_cmp);
    let (Some(low), Some(high)) = (values.first(), values.last()) else {
        return Spread::default();
    };
    Spread {
        average: values.iter().sum::<f64>() / values.len() as f64,
        low: *low,
        high: *high,
        p50: quantile(&values, 0.50),
        p90: quantile(&values, 0.90),
        p99: quantile(&values, 0.99),
    }
}

/// The value below which a share of the sorted values lies, straight between its neighbours.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (low, high) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    low + (high - low) * place.fract()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn rate(count: f64, seconds: f64) -> f64 {
    if seconds > 0.0 { count / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn sample(sent: u64, events: &[u64]) -> Sample {
        let events: Vec<_> = events.iter().copied().map(at).collect();
        let ended = events.last().copied().unwrap_or(at(sent));
        Sample {
            sent: at(sent),
            tokens: events.len() as u64,
            events,
            ended,
            prompt_tokens: 5,
        }
    }

    #[test]
    fn quantiles_lie_between_their_neighbours() {
        let found = spread((0..=100).rev().map(f64::from).collect());
        assert_eq!(
            (found.low, found.p50, found.p90, found.p99, found.high),
            (0.0, 50.0, 90.0, 99.0, 100.0)
        );
        assert_eq!(spread(vec![1.0, 2.0]).p50, 1.5);
        assert_eq!(spread(vec![7.0]).p99, 7.0);
        assert_eq!(spread(vec![]), Spread::default());
    }

    #[test]
    fn times_are_measured_from_each_request_s_own_start() {
        let figures = summarize(
            2,
            &[sample(100, &[150, 160, 180]), sample(110, &[140, 200])],
            &[],
        );
        assert_eq!(
            (figures.first_token.low, figures.first_token.high),
            (30.0, 50.0)
        );
        assert_eq!(
            (figures.between_tokens.low, figures.between_tokens.high),
            (10.0, 60.0)
        );
        assert_eq!((figures.request.low, figures.request.high), (80.0, 90.0));
        assert_eq!(
            (figures.tokens, figures.prompt_tokens, figures.requests),
            (5, 10, 2)
        );
        assert!(
            (figures.token_rate() - 50.0).abs() < 1e-9,
            "{}",
            figures.token_rate()
        );
    }

    #[test]
    fn failures_are_counted_apart() {
        let figures = summarize(1, &[], &["429".to_owned(), "500".to_owned()]);
        assert_eq!(
            (
                figures.requests,
                figures.failures,
                figures.reason.as_deref()
            ),
            (0, 2, Some("429"))
        );
        assert_eq!((figures.token_rate(), figures.request_rate()), (0.0, 0.0));
    }

    #[test]
    fn an_answer_without_tokens_has_no_first_one() {
        let figures = summarize(1, &[sample(5, &[])], &[]);
        assert_eq!(figures.first_token, Spread::default());
    }
}
