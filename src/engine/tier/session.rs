//! What is there with and without tiers: vLLM's requests, the step's orders, the operation log.

use super::recorder::Recorder;
use super::requests::Requests;
use super::savings::Savings;
use super::trace::OperationLog;
use kvcellar_block::plan::StepPlan;

/// What every way of a block works with, beside the tiers.
pub(super) struct Session {
    /// vLLM's requests.
    pub(super) requests: Requests,
    /// The workers' orders of this step.
    pub(super) plan: StepPlan,
    /// The operation log, if the user wants one.
    pub(super) log: OperationLog,
    /// The record of requests, if the user wants one.
    pub(super) recorder: Option<Recorder>,
    /// What loads saved.
    pub(super) savings: Savings,
}
