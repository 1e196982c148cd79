//! Draws the measurement while it runs.

use std::io;
use std::time::{Duration, Instant};

use crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Gauge, Paragraph, Row, Sparkline, Table};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::mpsc::error::TryRecvError;

use crate::args::Args;
use crate::load::Update;
use crate::report::{COLUMNS, rows};
use crate::stats::Figures;

/// Time between two pictures, and between two bars of the token rate.
const FRAME: Duration = Duration::from_millis(100);
/// Bars that are kept.
const BARS: usize = 512;

/// What is on the screen.
struct Screen {
    title: String,
    measurements: usize,
    measured: Vec<Figures>,
    batch_size: u32,
    requests: u64,
    ended: u64,
    failed: u64,
    tokens: u64,
    bars: Vec<u64>,
    done: bool,
}

/// Draws until the user leaves. Returns the figures there are by then; the terminal is as it was before.
pub fn show(args: &Args, mut updates: UnboundedReceiver<Update>) -> io::Result<Vec<Figures>> {
    let mut terminal = ratatui::try_init()?;
    let mut screen = Screen::new(args);
    let outcome = loop {
        screen.take_updates(&mut updates);
        if let Err(error) = terminal.draw(|frame| screen.draw(frame)) {
            break Err(error);
        }
        match left(Instant::now() + FRAME) {
            Ok(false) => {}
            Ok(true) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    ratatui::restore();
    outcome.map(|()| screen.measured)
}

/// Whether the user asks to leave, by `q`, Escape or Ctrl-C, before the next picture is due.
fn left(due: Instant) -> io::Result<bool> {
    while event::poll(due.saturating_duration_since(Instant::now()))? {
        if let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
        {
            let interrupt =
                key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

impl Screen {
    fn new(args: &Args) -> Self {
        let load = match args.rate {
            Some(rate) => format!("{rate} requests/s"),
            None => "waiting callers".to_owned(),
        };
        let lengths = format!("{} + {} tokens", args.sequence_length, args.decode_length);
        Self {
            title: format!(" {} · {lengths} · {load} ", args.url),
            measurements: args.batch_size.len(),
            measured: Vec::new(),
            batch_size: 0,
            requests: 0,
            ended: 0,
            failed: 0,
            tokens: 0,
            bars: Vec::new(),
            done: false,
        }
    }

    fn take_updates(&mut self, updates: &mut UnboundedReceiver<Update>) {
        let before = self.tokens;
        loop {
            match updates.try_recv() {
                Ok(update) => self.take(update),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.done = true;
                    break;
                }
            }
        }
        if !self.done {
            self.bars.push(self.tokens.saturating_sub(before));
            let surplus = self.bars.len().saturating_sub(BARS);
            self.bars.drain(..surplus);
        }
    }

    fn take(&mut self, update: Update) {
        match update {
            Update::Started {
                batch_size,
                requests,
            } => {
                (self.batch_size, self.requests, self.ended, self.failed) =
                    (batch_size, requests, 0, 0);
            }
            Update::Tokens => self.tokens += 1,
            Update::Ended { good } => {
                self.ended += 1;
                self.failed += u64::from(!good);
            }
            Update::Measured(figures) => self.measured.push(*figures),
        }
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let heights = [
            Constraint::Length(3),
            Constraint::Length(3),
            Constraint::Length(6),
            Constraint::Min(5),
            Constraint::Length(1),
        ];
        let [all, current, bars, table, foot] = Layout::vertical(heights).areas(frame.area());
        let share = |part: f64, whole: f64| {
            if whole > 0.0 {
                (part / whole).clamp(0.0, 1.0)
            } else {
                0.0
            }
        };

        let part = share(self.ended as f64, self.requests as f64);
        let within = if self.done || part >= 1.0 { 0.0 } else { part };
        let total = share(
            self.measured.len() as f64 + within,
            self.measurements as f64,
        );
        let head = Block::bordered().title(self.title.as_str().bold());
        frame.render_widget(
            Gauge::default()
                .block(head)
                .gauge_style(Color::Cyan)
                .ratio(total),
            all,
        );

        let failed = if self.failed > 0 {
            format!(" · {} failed", self.failed)
        } else {
            String::new()
        };
        let title = format!(
            " batch {} · {} of {} requests{failed} ",
            self.batch_size, self.ended, self.requests
        );
        let gauge = Gauge::default()
            .block(Block::bordered().title(title))
            .gauge_style(Color::Green);
        frame.render_widget(gauge.ratio(part), current);

        let newest = self
            .bars
            .len()
            .saturating_sub(bars.width.saturating_sub(2) as usize);
        let block = Block::bordered().title(" token events in each tenth of a second ");
        let line = Sparkline::default()
            .block(block)
            .style(Color::Yellow)
            .data(&self.bars[newest..]);
        frame.render_widget(line, bars);
        frame.render_widget(self.table(), table);

        let state = if self.done { "done" } else { "running" };
        frame.render_widget(
            Paragraph::new(Line::from(format!(" {state} · q leaves and prints the figures")).dim()),
            foot,
        );
    }

    fn table(&self) -> Table<'_> {
        let widths = COLUMNS.map(|name| Constraint::Length(name.len().max(8) as u16));
        let body = rows(&self.measured).into_iter().map(Row::new);
        let head = Row::new(COLUMNS).style(Style::new().bold());
        let title = " times in ms: TTFT to the first token, ITL between tokens ";
        Table::new(body, widths)
            .header(head)
            .block(Block::bordered().title(title))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::stats::{Sample, summarize};

    #[test]
    fn the_picture_shows_progress_and_figures_in_any_size() {
        let args = Args::parse_from(["text-generation-benchmark", "--batch-size", "4,8"]);
        let mut screen = Screen::new(&args);
        let (sender, mut updates) = tokio::sync::mpsc::unbounded_channel();
        let at = Duration::from_millis;
        let sample = Sample {
            sent: at(0),
            events: vec![at(10)],
            ended: at(20),
            prompt_tokens: 3,
            tokens: 1,
        };
        let sent = [
            Update::Started {
                batch_size: 4,
                requests: 40,
            },
            Update::Tokens,
            Update::Ended { good: false },
            Update::Measured(Box::new(summarize(4, &[sample], &[]))),
        ];
        sent.into_iter()
            .for_each(|update| sender.send(update).expect("an open channel"));
        screen.take_updates(&mut updates);
        for (width, height) in [(120, 30), (20, 8), (1, 1)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
            terminal
                .draw(|frame| screen.draw(frame))
                .expect("a picture");
            let text = terminal.backend().to_string();
            if width == 120 {
                for words in [
                    "batch 4 · 1 of 40 requests · 1 failed",
                    "TTFT p50",
                    "10.00",
                    "running",
                ] {
                    assert!(text.contains(words), "{words}: {text}");
                }
            }
        }
        drop(sender);
        screen.take_updates(&mut updates);
        assert!(screen.done);
    }
}
