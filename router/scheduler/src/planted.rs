//! Faults for the simulator to find.

/// A fault planted on purpose, to prove that the simulator finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlantedBug {
    /// A cancelled request keeps a page.
    LeakPage,
    /// Pages are published when a step is planned, before the shard answered.
    PublishUnacked,
    /// Prefix keys do not say under which adapter a page was written.
    KeyWithoutAdapter,
    /// Prefix keys do not say whether a page was written for a long sequence.
    KeyWithoutLength,
    /// Outcomes of an old epoch are taken for the current one.
    AcceptStale,
    /// Prefix keys do not say which images a page was written for.
    KeyWithoutImages,
    /// A page of a released memory stays behind.
    LeakMemory,
    /// Steps cut images whose ids see each other.
    CutImages,
    /// Tenants pay for the tokens of answers alone.
    FreePrompts,
    /// Pages count as computed up to the last guess, right or wrong.
    TrustGuesses,
    /// Tokens count as computed once the row before theirs is answered, while theirs is in flight.
    TrustInFlight,
    /// A row goes ahead although the pending token is the last that was asked for.
    Overrun,
    /// A row goes ahead without a page for the pending token.
    ForgetPending,
    /// A row goes ahead of one with guesses.
    GuessAhead,
    /// Sequences give way while a row of theirs is in flight.
    PreemptInFlight,
    /// A release is taken for said with the step that is in flight already.
    ReleaseInFlight,
    /// An adapter counts as unused once the release of its sequence is sent.
    UnholdEarly,
    /// A death counts twice for a sequence with two rows in flight.
    StrikeTwice,
    /// An adapter is placed at the end of the pool, whoever has pages there.
    PlaceOverOthers,
    /// Adapters are displaced whether or not their sequences run.
    DisplaceInUse,
    /// The shard is not told to place an adapter before its rows.
    RowsBeforePlacement,
    /// The shard is not told that an adapter's pages are others' now.
    DisplaceUntold,
    /// An adapter that is unloaded keeps its pages.
    LeakRun,
    /// Adapters are taken to lie where they lay in the last epoch.
    KeepPlaces,
}
