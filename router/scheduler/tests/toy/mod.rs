//! A scheduler over a shard that always answers 7.
#![allow(dead_code)]

use kvrun_scheduler::{
    Acceptance, Config, Grant, Model, Reply, Request, RowReply, Scheduler, Step, Time,
};
use std::sync::Arc;

pub struct Toy {
    pub scheduler: Scheduler,
    pub now: Time,
    pub epoch: u64,
    step_tokens: u32,
}

impl Toy {
    pub fn new(pages: u32, step_tokens: u32, step_rows: u32) -> Self {
        Self::guessing(pages, step_tokens, step_rows, 0)
    }

    /// One that computes so many tokens on a guess.
    pub fn guessing(pages: u32, step_tokens: u32, step_rows: u32, speculate: u32) -> Self {
        let scheduler = Scheduler::new(Config {
            step_rows,
            max_tokens: u32::MAX,
            queue_requests: 10_000,
            queue_tokens: u64::MAX,
            share_prefixes: false,
            speculate,
        });
        let mut toy = Self {
            scheduler,
            now: Time::ZERO,
            epoch: 0,
            step_tokens,
        };
        toy.begin(pages);
        toy
    }

    pub fn begin(&mut self, pages: u32) {
        self.epoch += 1;
        let grant = Grant {
            epoch: self.epoch,
            pages,
            step_tokens: self.step_tokens,
            adapter_bytes: 100,
            model: Model {
                digest: "m".to_owned(),
                page_tokens: 16,
                vocabulary: 100,
                long_after: 1000,
                ..Model::default()
            },
        };
        self.scheduler.begin_epoch(self.now, grant);
    }

    pub fn ask(&mut self, tenant: &str, prompt: u32, answer: u32) -> u64 {
        let mut request = request(tenant, prompt, answer);
        request.fingerprint = tenant.bytes().map(u64::from).sum();
        self.scheduler.submit(self.now, request).unwrap()
    }

    pub fn plan(&mut self) -> Option<Step> {
        self.scheduler.plan(self.now)
    }

    pub fn ahead(&mut self) -> Option<Step> {
        self.scheduler.plan_ahead(self.now)
    }

    pub fn answer(&mut self, step: &Step) {
        self.now += Time::from_millis(10);
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
        assert_eq!(
            self.scheduler.commit(self.now, &reply),
            Ok(Acceptance::Committed)
        );
        self.scheduler.audit().unwrap();
    }

    pub fn turn(&mut self) -> Step {
        let step = self.plan().expect("work");
        self.answer(&step);
        step
    }
}

pub fn request(tenant: &str, prompt: u32, answer: u32) -> Request {
    Request {
        prompt: (0..prompt).collect(),
        max_new_tokens: answer,
        tenant: Arc::from(tenant),
        reuse_prefix: true,
        ..Request::default()
    }
}

pub fn sizes(step: &Step) -> Vec<(u64, u32)> {
    step.rows
        .iter()
        .map(|row| (row.sequence, row.tokens))
        .collect()
}
