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

use vllm::{Op, Shape, Simulation};

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

fn run(shape: Shape, slots: u32, ops: &[Op]) -> Result<(), TestCaseError> {
    let mut simulation = Simulation::new(shape, slots);
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
        run(Shape::Full, slots, &ops)?;
    }

    #[test]
    fn full_and_sliding_window(slots in 1_u32..60, ops in prop::collection::vec(op(), 1..120)) {
        run(Shape::Hybrid, slots, &ops)?;
    }

    #[test]
    fn draft_model_groups(slots in 1_u32..60, ops in prop::collection::vec(op(), 1..120)) {
        run(Shape::Draft, slots, &ops)?;
    }
}
