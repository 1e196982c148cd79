//! Stretches of a prompt that images became: part of a page's key, and sometimes indivisible.

/// The ids that one image became, in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Position of the first.
    pub start: u32,
    /// How many they are, at least one.
    pub tokens: u32,
    /// SHA-256 of the image.
    pub digest: [u8; 32],
}

impl Span {
    /// The position after the last.
    pub fn end(&self) -> u32 {
        self.start + self.tokens
    }

    /// Whether a border at `position` cuts it.
    fn is_cut_at(&self, position: u32) -> bool {
        self.start < position && position < self.end()
    }
}

/// The span that a border at `position` cuts. Spans are in order and apart.
pub fn cut_at(spans: &[Span], position: u32) -> Option<&Span> {
    let next = spans.partition_point(|span| span.end() <= position);
    spans.get(next).filter(|span| span.is_cut_at(position))
}

/// Spans that have an id within `start..end`.
pub fn within(spans: &[Span], start: u32, end: u32) -> impl Iterator<Item = &Span> {
    let first = spans.partition_point(|span| span.end() <= start);
    spans[first..]
        .iter()
        .take_while(move |span| span.start < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans() -> [Span; 3] {
        [(2, 3), (5, 2), (9, 1)].map(|(start, tokens)| Span {
            start,
            tokens,
            digest: [start as u8; 32],
        })
    }

    #[test]
    fn only_a_border_between_two_ids_of_a_span_cuts_it() {
        let spans = spans();
        let cut = |position| cut_at(&spans, position).map(|span| span.start);
        let found: Vec<_> = (0..12).map(cut).collect();
        let (a, b) = (Some(2), Some(5));
        assert_eq!(
            found,
            [
                None, None, None, a, a, None, b, None, None, None, None, None
            ]
        );
    }

    #[test]
    fn a_stretch_holds_the_spans_that_it_touches() {
        let spans = spans();
        let touched = |start, end| {
            within(&spans, start, end)
                .map(|span| span.start)
                .collect::<Vec<_>>()
        };
        assert_eq!(touched(0, 2), [0; 0]);
        assert_eq!(touched(4, 6), [2, 5]);
        assert_eq!(touched(0, 99), [2, 5, 9]);
        assert_eq!(touched(7, 9), [0; 0]);
    }
}
