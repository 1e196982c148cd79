//! Memory and images: what a step must hold whole, what is shared, and what is refused, over a shard that answers 7.
#![allow(clippy::unwrap_used)]

use kvrun_scheduler::{
    Acceptance, Config, Grant, Model, Refusal, Reply, Request, RowReply, Scheduler, Span, Step,
    Time,
};
use std::sync::Arc;

struct Toy {
    scheduler: Scheduler,
    now: Time,
}

impl Toy {
    fn new(pages: u32, step_tokens: u32, model: Model) -> Self {
        let mut scheduler = Scheduler::new(Config {
            step_rows: 8,
            max_tokens: u32::MAX,
            queue_requests: 100,
            queue_tokens: u64::MAX,
            share_prefixes: true,
            speculate: 0,
        });
        let grant = Grant {
            epoch: 1,
            pages,
            step_tokens,
            adapter_bytes: 0,
            model: Model {
                digest: "m".to_owned(),
                page_tokens: 16,
                vocabulary: 100,
                ..model
            },
        };
        scheduler.begin_epoch(Time::ZERO, grant);
        Self {
            scheduler,
            now: Time::ZERO,
        }
    }

    fn ask(&mut self, request: Request) -> Result<u64, Refusal> {
        self.scheduler.submit(self.now, request)
    }

    fn turn(&mut self) -> Step {
        self.now += Time::from_millis(10);
        let step = self.scheduler.plan(self.now).expect("work");
        let rows = step.rows.iter().map(|row| RowReply {
            sequence: row.sequence,
            tokens: if row.sample { vec![7] } else { vec![] },
            error: None,
        });
        let reply = Reply {
            epoch: step.epoch,
            number: step.number,
            rows: rows.collect(),
        };
        let accepted = self.scheduler.commit(self.now, &reply);
        assert_eq!(accepted, Ok(Acceptance::Committed));
        self.scheduler.audit().unwrap();
        step
    }

    /// Computes all prompts, and then a step without, before which nothing goes beside it.
    fn settle(&mut self) {
        while self.turn().rows.iter().any(|row| row.tokens > 1) {}
    }
}

fn together() -> Model {
    Model {
        together: true,
        ..Model::default()
    }
}

/// A prompt of `before` ids, an image of `image` ids and `after` ids.
fn illustrated(before: u32, image: u32, after: u32, digest: u8) -> Request {
    let span = Span {
        start: before,
        tokens: image,
        digest: [digest; 32],
    };
    Request {
        prompt: (0..before + image + after).collect(),
        images: Arc::from([span]),
        max_new_tokens: 4,
        reuse_prefix: true,
        tenant: Arc::from("t"),
        ..Request::default()
    }
}

fn sourced(source: u32, answer: u32) -> Request {
    Request {
        prompt: Arc::from([0]),
        memory_tokens: source,
        max_new_tokens: answer,
        reuse_prefix: true,
        tenant: Arc::from("t"),
        ..Request::default()
    }
}

fn sizes(step: &Step) -> Vec<(u64, u32)> {
    let rows = step.rows.iter();
    rows.map(|row| (row.sequence, row.tokens)).collect()
}

#[test]
fn a_source_is_read_by_the_step_that_admits_it() {
    let mut toy = Toy::new(20, 64, Model::default());
    let first = toy.ask(sourced(40, 20)).unwrap();
    let second = toy.ask(sourced(40, 20)).unwrap();
    let step = toy.turn();
    assert_eq!(
        (sizes(&step), step.admit[0].memory.len()),
        (vec![(first, 1)], 3)
    );
    assert_eq!(sizes(&toy.turn()), [(first, 1)]);
    let step = toy.turn();
    assert_eq!(sizes(&step), [(first, 1), (second, 1)]);
    assert_eq!(toy.scheduler.load().pages.used, 2 * (3 + 1));
    toy.scheduler.cancel(toy.now, first);
    toy.scheduler.cancel(toy.now, second);
    assert_eq!(toy.scheduler.load().pages.free, 20);
}

#[test]
fn memory_that_fits_no_step_or_no_pool_is_refused() {
    let mut toy = Toy::new(5, 64, Model::default());
    let (asked, limit) = (65, 64);
    let refused = Err(Refusal::Indivisible { asked, limit });
    assert_eq!(toy.ask(sourced(64, 3)), refused);
    let (asked, limit) = (96, 80);
    assert_eq!(
        toy.ask(sourced(63, 20)),
        Err(Refusal::TooLong { asked, limit })
    );
    assert!(toy.ask(sourced(63, 15)).is_ok());
}

#[test]
fn a_chunk_ends_before_an_image_that_it_cannot_hold() {
    let mut toy = Toy::new(100, 64, together());
    let id = toy.ask(illustrated(40, 50, 10, 1)).unwrap();
    let chunks: Vec<_> = (0..3).map(|_| sizes(&toy.turn())[0]).collect();
    assert_eq!(chunks, [(id, 40), (id, 60), (id, 1)]);
}

#[test]
fn newcomers_wait_while_an_image_waits_for_room() {
    let mut toy = Toy::new(100, 64, together());
    let short = |answer| Request {
        prompt: Arc::from([1]),
        max_new_tokens: answer,
        tenant: Arc::from("u"),
        ..Request::default()
    };
    for _ in 0..3 {
        toy.ask(short(30)).unwrap();
    }
    toy.turn();
    let large = toy.ask(illustrated(16, 62, 2, 1)).unwrap();
    let first = toy.turn();
    assert!(sizes(&first).contains(&(large, 16)));
    let late = toy.ask(short(500)).unwrap();
    let mut steps = 0;
    loop {
        let step = toy.turn();
        if let Some(row) = step.rows.iter().find(|row| row.sequence == large) {
            assert!(row.tokens >= 62);
            break;
        }
        assert!(
            !sizes(&step).iter().any(|&(id, _)| id == late),
            "it was overtaken"
        );
        steps += 1;
        assert!(steps < 40);
    }
}

#[test]
fn an_image_larger_than_a_step_is_refused_only_where_it_must_not_be_cut() {
    let (asked, limit) = (65, 64);
    let mut toy = Toy::new(100, 64, together());
    assert_eq!(
        toy.ask(illustrated(1, 65, 1, 1)),
        Err(Refusal::Indivisible { asked, limit })
    );
    let mut toy = Toy::new(100, 64, Model::default());
    let id = toy.ask(illustrated(1, 65, 1, 1)).unwrap();
    assert_eq!(sizes(&toy.turn()), [(id, 64)]);
}

#[test]
fn what_is_shared_ends_at_no_cut_and_holds_no_other_image() {
    let start = |model: Model, digest| {
        let mut toy = Toy::new(100, 200, model);
        toy.ask(illustrated(20, 30, 1, 1)).unwrap();
        toy.settle();
        let again = toy.ask(illustrated(20, 30, 1, digest)).unwrap();
        let step = toy.turn();
        let row = step.rows.iter().find(|row| row.sequence == again);
        row.unwrap().start
    };
    assert_eq!(
        (start(Model::default(), 1), start(Model::default(), 2)),
        (48, 16)
    );
    assert_eq!((start(together(), 1), start(together(), 2)), (16, 16));
}

#[test]
fn images_that_are_looked_at_are_shared_as_well() {
    let start = |digest| {
        let looked_at = |digest| Request {
            memory_tokens: 5,
            ..illustrated(20, 1, 30, digest)
        };
        let mut toy = Toy::new(100, 200, Model::default());
        toy.ask(looked_at(1)).unwrap();
        toy.settle();
        let again = toy.ask(looked_at(digest)).unwrap();
        let step = toy.turn();
        assert_eq!(step.admit[0].memory.len(), 1, "a memory is nobody else's");
        let row = step.rows.iter().find(|row| row.sequence == again);
        row.unwrap().start
    };
    assert_eq!((start(1), start(2)), (48, 16));
}

#[test]
fn a_recurrent_state_and_a_source_are_shared_with_nobody() {
    let recurrent = Model {
        recurrent: true,
        ..Model::default()
    };
    let read = Request {
        memory_tokens: 5,
        images: Arc::default(),
        ..illustrated(40, 1, 1, 1)
    };
    for (model, request) in [
        (recurrent, illustrated(40, 1, 1, 1)),
        (Model::default(), read),
    ] {
        let mut toy = Toy::new(100, 200, model);
        toy.ask(request.clone()).unwrap();
        toy.settle();
        toy.ask(request).unwrap();
        assert_eq!(toy.turn().rows[1].start, 0);
        assert_eq!(toy.scheduler.load().pages.cached, 0);
    }
}
