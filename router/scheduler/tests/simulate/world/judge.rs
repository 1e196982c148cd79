//! What must hold: after every event, at the end of every request, and when everything is over.

use super::{BAD, Client, Culprit, DEADLY, END, POISON, World};
use kvrun_scheduler::{Event, Failure, Finish, Reply, Step, Time, What};

impl World {
    pub(super) fn hear(&mut self, reply: Option<&Reply>) -> Result<(), String> {
        for event in self.scheduler.take_events() {
            self.tell(|| format!("{event:?}"));
            let id = event.request;
            let Some(mut client) = self.clients.remove(&id) else {
                return Err(format!("an event of a cancelled request: {event:?}"));
            };
            hold!(!client.ended, "an event after the terminal one: {event:?}");
            self.happened(&mut client, event, reply)?;
            self.clients.insert(id, client);
        }
        Ok(())
    }

    fn happened(
        &mut self,
        client: &mut Client,
        event: Event,
        reply: Option<&Reply>,
    ) -> Result<(), String> {
        let tainted = |token| {
            let given = client.request.prompt.iter().chain(&client.beside.source);
            given.chain(&client.got).any(|&known| known == token)
        };
        match event.what {
            What::Started { cached_tokens, .. } => {
                hold!(
                    cached_tokens < client.request.prompt.len() as u32,
                    "the whole prompt was cached"
                );
                hold!(
                    cached_tokens == 0 || client.request.reuse_prefix,
                    "a prefix was reused against the wish"
                );
                self.seen.cached_tokens += u64::from(cached_tokens);
                if self.is_long(&client.request) {
                    self.seen.cached_long += u64::from(cached_tokens);
                }
                let images = client.request.images.iter();
                self.seen.cached_images +=
                    images.filter(|image| image.end() <= cached_tokens).count() as u64;
            }
            What::Token { row, place } => {
                let reply = reply.ok_or("a token without a reply")?;
                let token = reply.rows[row].tokens[place];
                hold!(
                    reply.rows[row].sequence == event.request,
                    "somebody else's token"
                );
                if client.expected.is_none() {
                    let folder = client.request.adapter.and_then(|id| self.folders.get(&id));
                    let digest = folder
                        .and_then(|folder| folder.loaded.as_deref())
                        .unwrap_or("");
                    client.expected = Some(client.beside.answer(
                        &client.request,
                        digest,
                        &client.sampling,
                        self.is_long(&client.request),
                    ));
                    self.foreseen.keep(event.request, client);
                }
                if place > 0 {
                    self.served_on_a_guess(client);
                }
                let place = client.got.len();
                let expected = client
                    .expected
                    .as_ref()
                    .and_then(|all| all.get(place))
                    .copied();
                hold!(
                    expected == Some(token),
                    "request {}: token {place} is {token}, alone it is {expected:?}",
                    event.request
                );
                client.got.push(token);
                client.strikes = 0;
                client.recovering_since = None;
            }
            What::Finished(finish) => {
                hold!(
                    client.expected.as_ref() == Some(&client.got),
                    "finished before the end"
                );
                let ends = client.got.last() == Some(&END);
                hold!(
                    ends == (finish == Finish::EndToken),
                    "{finish:?} after {:?}",
                    client.got.last()
                );
                client.ended = true;
                self.seen.finished += 1;
            }
            What::Failed(failure) => {
                match &failure {
                    Failure::Row(_) => {
                        hold!(tainted(BAD), "a good row failed");
                        self.seen.row_errors += 1;
                    }
                    Failure::Deadline => {
                        hold!(
                            client
                                .request
                                .deadline
                                .is_some_and(|deadline| deadline <= self.now),
                            "failed too early"
                        );
                        self.seen.deadlines += 1;
                    }
                    Failure::Adapter(_) => {
                        if let Some(folder) = client
                            .request
                            .adapter
                            .and_then(|id| self.folders.get_mut(&id))
                        {
                            folder.was_unusable = true;
                        }
                        hold!(
                            client.request.adapter.is_some(),
                            "the base model failed as an adapter"
                        );
                        self.seen.adapter_failures += 1;
                    }
                    Failure::Unavailable(_) => {
                        let waited = client
                            .recovering_since
                            .map(|since| self.now.saturating_sub(since));
                        let late = waited.is_some_and(|waited| waited >= Time::from_secs(120));
                        hold!(late || self.shrunk, "given up without reason");
                    }
                    Failure::Deadly => {
                        let now = |culprit: &Culprit| {
                            culprit.since == self.now
                                && culprit.fingerprint == client.request.fingerprint
                        };
                        hold!(self.culprits.iter().any(now), "blamed without reason");
                        self.seen.culprits +=
                            u64::from(client.strikes >= DEADLY && tainted(POISON));
                    }
                    Failure::ShuttingDown => return Err("nobody shuts down".to_owned()),
                }
                client.ended = true;
            }
        }
        Ok(())
    }

    /// Nothing is computed for a request that has ended, and no token that an answer cannot hold.
    pub(super) fn judge_rows(&self, step: &Step) -> Result<(), String> {
        for row in &step.rows {
            let client = self.clients.get(&row.sequence);
            let Some(client) = client.filter(|client| !client.ended) else {
                return Err(format!("a row of {}, which has ended", row.sequence));
            };
            let whole = client.request.prompt.len() as u32 + client.request.max_new_tokens;
            let end = row.start + row.tokens;
            hold!(
                end < whole,
                "request {} of {whole} tokens is computed up to token {end}",
                row.sequence
            );
        }
        Ok(())
    }

    /// Invariants between two events.
    pub(super) fn check(&mut self) -> Result<(), String> {
        for (id, view) in self.scheduler.adapters().iter() {
            if let (kvrun_scheduler::Residency::Failed { .. }, Some(folder)) =
                (&view.residency, self.folders.get_mut(&id))
            {
                folder.was_unusable = true;
            }
        }
        self.scheduler.audit()?;
        if self.scheduler.rests() {
            let later = self.now + Time::from_secs(3600);
            let orders = self.scheduler.plan_adapters(later);
            let step = self.scheduler.plan(later);
            let step = step.or_else(|| self.scheduler.plan_ahead(later));
            hold!(
                orders.is_empty() && step.is_none(),
                "time alone brought {orders:?} and {step:?} to a scheduler that rests"
            );
        }
        let open = self.clients.values().filter(|client| !client.ended).count();
        for (id, client) in &self.clients {
            let journal = self.scheduler.journal(*id).map(|journal| journal.answer());
            match (client.ended, journal) {
                (true, None) => {}
                (false, Some(answer)) => hold!(
                    answer == client.got,
                    "request {id} was told other tokens than its journal has"
                ),
                (ended, _) => {
                    return Err(format!(
                        "request {id} ended: {ended}, and the scheduler thinks otherwise"
                    ));
                }
            }
        }
        let load = self.scheduler.load();
        hold!(
            load.waiting as usize + load.running as usize == open,
            "{open} requests are open, {load:?}"
        );
        Ok(())
    }

    /// No more faults: everything open must end and everything must be given back.
    pub(super) fn calm(&mut self) -> Result<(), String> {
        self.told.then(|| println!("-- calm"));
        self.troubled = false;
        self.folders
            .values_mut()
            .for_each(|folder| folder.left = true);
        for turn in 0.. {
            hold!(turn < 20_000, "stuck: {:?}", self.scheduler.load());
            self.now += Time::from_millis(20);
            if self.shard.is_none() {
                self.begin()?;
            }
            self.orders()?;
            while !self.calls.is_empty() {
                self.finish_call()?;
            }
            match self.compute()? {
                Some(reply) => self.commit(&reply)?,
                None => self.plan()?,
            }
            self.plan_ahead()?;
            if turn % 16 == 0 {
                self.check()?;
            }
            if self.clients.values().all(|client| client.ended) && self.in_flight.is_empty() {
                for id in self.folders.keys() {
                    self.scheduler.adapters_mut().leave(*id);
                }
                if self.scheduler.is_idle() && self.scheduler.adapters().iter().next().is_none() {
                    break;
                }
            }
        }
        self.check()?;
        let pages = self.scheduler.load().pages;
        hold!(pages.used + pages.adapters == 0, "{pages:?} at idle");
        if let Some(shard) = &self.shard {
            let pages = shard.pages_in_use() + shard.adapter_pages();
            let held = (shard.live(), pages, shard.adapters());
            hold!(
                held == (0, 0, 0),
                "the shard still holds {held:?} (sequences, pages, adapters)"
            );
        }
        Ok(())
    }
}
