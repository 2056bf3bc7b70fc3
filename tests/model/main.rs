//! The tier engine against a plain model, driven by random histories of a simulated vLLM.
//!
//! The simulation keeps what real memory would hold: every vLLM block and every slot has a content,
//! copies move contents, and blocks are given to others as soon as vLLM frees them. So a missing
//! fence, a block served under a wrong key, or a slot reused too early shows as a wrong content.
//! The model (`dram.rs`) knows the documented rules and nothing of the engine's structures; answers
//! and states must be equal after every operation.
//!
//! `KVCELLAR_SEEDS=n` runs more histories; a failure prints its seed and shrunk history.

#![allow(clippy::expect_used, reason = "a broken expectation is a failed test")]
#![allow(clippy::manual_is_multiple_of, clippy::needless_pass_by_value, reason = "reads better in a simulation")]

mod dram;
mod vllm;

use proptest::prelude::*;

use kvcellar_block::kinds::{ChunkedLocal, SlidingWindow};
use kvcellar_block::{GroupKind, GroupSpec, Grouping};
use vllm::{Op, Simulation};

fn cases() -> u32 {
    std::env::var("KVCELLAR_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(300)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_u8..6, 1_u8..14, 0_u8..3).prop_map(|(family, blocks, tail)| Op::Arrive { family, blocks, tail }),
        6 => any::<u8>().prop_map(Op::Admit),
        8 => (1_u8..5).prop_map(Op::Step),
        6 => (any::<u8>(), any::<bool>()).prop_map(|(which, fail)| Op::Copy { which, fail: fail && which % 5 == 0 }),
        2 => any::<u8>().prop_map(Op::Finish),
        1 => any::<u8>().prop_map(Op::Preempt),
        1 => Just(Op::Reset),
    ]
}

/// Groups of these kinds, block sizes, and draft models or not. `finer`: hashes cover half of the
/// smallest block.
fn grouping(groups: &[(GroupKind, u32, bool)], finer: bool) -> Grouping {
    let spec = |(kind, block_tokens, eagle): &(GroupKind, u32, bool)| GroupSpec {
        kind: *kind,
        kind_name: String::new(),
        block_tokens: *block_tokens,
        eagle: *eagle,
    };
    let sizes = || groups.iter().map(|(_, tokens, _)| *tokens);
    let smallest = sizes().min().unwrap_or(4);
    Grouping {
        groups: groups.iter().map(spec).collect(),
        hash_tokens: if finer { smallest / 2 } else { smallest },
        hit_tokens: sizes().max().unwrap_or(4),
    }
}

fn kind() -> impl Strategy<Value = GroupKind> {
    prop_oneof![
        2 => Just(GroupKind::Full),
        2 => (1_u32..30, 0_u32..3).prop_map(|(window, extra)| SlidingWindow { window, extra }).prop_map(GroupKind::SlidingWindow),
        2 => (1_u32..40).prop_map(|chunk| GroupKind::ChunkedLocal(ChunkedLocal { chunk })),
        2 => Just(GroupKind::State),
    ]
}

/// Up to four groups of any kinds. With a draft model there are no chunks (vLLM refuses that), and
/// states have no draft.
fn mix() -> impl Strategy<Value = Grouping> {
    let group = (kind(), prop_oneof![Just(4_u32), Just(8), Just(16)], any::<bool>());
    (prop::collection::vec(group, 1..5), any::<bool>(), any::<bool>()).prop_map(|(mut groups, drafts, finer)| {
        let drafts = drafts && !groups.iter().any(|(kind, ..)| matches!(kind, GroupKind::ChunkedLocal(_)));
        for (kind, _, eagle) in &mut groups {
            *eagle &= drafts && *kind != GroupKind::State;
        }
        grouping(&groups, finer)
    })
}

const WINDOW: GroupKind = GroupKind::SlidingWindow(SlidingWindow { window: 10, extra: 0 });

fn run(grouping: Grouping, slots: u32, ops: &[Op]) -> Result<(), TestCaseError> {
    follow(Simulation::new(grouping, slots), ops)
}

fn follow(mut simulation: Simulation, ops: &[Op]) -> Result<(), TestCaseError> {
    for op in ops {
        simulation.apply(op)?;
        simulation.check()?;
    }
    simulation.settle()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn full_attention(slots in 1_u32..40, ops in prop::collection::vec(op(), 1..120)) {
        run(grouping(&[(GroupKind::Full, 4, false)], false), slots, &ops)?;
    }

    #[test]
    fn full_and_sliding_window(slots in 1_u32..60, ops in prop::collection::vec(op(), 1..120)) {
        run(grouping(&[(GroupKind::Full, 8, false), (WINDOW, 4, false)], false), slots, &ops)?;
    }

    #[test]
    fn draft_model_groups(slots in 1_u32..60, ops in prop::collection::vec(op(), 1..120)) {
        let groups = [(GroupKind::Full, 4, false), (GroupKind::Full, 4, true), (WINDOW, 4, true)];
        run(grouping(&groups, false), slots, &ops)?;
    }

    #[test]
    fn full_attention_and_states(slots in 1_u32..60, ops in prop::collection::vec(op(), 1..120)) {
        run(grouping(&[(GroupKind::Full, 8, false), (GroupKind::State, 8, false)], true), slots, &ops)?;
    }

    #[test]
    fn any_mix_of_kinds_with_blocks_that_are_written_early(
        mix in mix(), slots in 1_u32..90, ops in prop::collection::vec(op(), 1..120),
    ) {
        follow(Simulation::new(mix, slots).writing_early(), &ops)?;
    }

    #[test]
    fn any_mix_of_kinds(mix in mix(), slots in 1_u32..90, ops in prop::collection::vec(op(), 1..120)) {
        run(mix, slots, &ops)?;
    }
}

/// Histories with these rules for vLLM and the model, and those for the engine. Whether any of them
/// ends otherwise than it should.
fn is_noticed(right: &[(GroupKind, u32, bool)], wrong: &[(GroupKind, u32, bool)]) -> bool {
    let quiet =
        ProptestConfig { cases: 300, failure_persistence: None, max_shrink_iters: 0, ..ProptestConfig::default() };
    let histories = (1_u32..40, prop::collection::vec(op(), 1..120));
    let mut runner = proptest::test_runner::TestRunner::new(quiet);
    let outcome = runner.run(&histories, |(slots, ops)| {
        follow(Simulation::with_rules(grouping(right, false), grouping(wrong, false), slots), &ops)
    });
    outcome.is_err()
}

#[test]
fn a_wrong_rule_of_any_kind_is_noticed() {
    let window = |window| GroupKind::SlidingWindow(SlidingWindow { window, extra: 0 });
    let chunk = |chunk| GroupKind::ChunkedLocal(ChunkedLocal { chunk });
    let pairs = [
        ("full attention taken for a window", GroupKind::Full, window(21)),
        ("a window one block short", window(10), window(6)),
        ("a window one block long", window(10), window(14)),
        ("a chunk one block off", chunk(16), chunk(20)),
        ("chunks taken for a window", chunk(16), window(17)),
        ("a state that is not needed", GroupKind::State, window(1)),
        ("the state of one block before, too", GroupKind::State, window(6)),
    ];
    for (what, right, wrong) in pairs {
        let beside = (GroupKind::Full, 4, false);
        assert!(is_noticed(&[beside, (right, 4, false)], &[beside, (wrong, 4, false)]), "not noticed: {what}");
    }
    let (state, window) = ((GroupKind::State, 4, false), (window(10), 4, false));
    assert!(is_noticed(&[state, window], &[window, state]), "not noticed: groups in another order");
    assert!(!is_noticed(&[state, window], &[state, window]), "the right rules are taken for wrong ones");
}
