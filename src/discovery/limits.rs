//! Bounds of what is kept of a cluster, and what happens at them.

use std::time::Duration;

/// Pods that are followed. Further ones are no engines, which is logged.
pub(crate) const PODS_MAX: usize = 4_096;

/// `InferenceObjective` objects that are followed. Further ones have no effect, which is logged.
pub(crate) const OBJECTIVES_MAX: usize = 4_096;

/// How long a command waits at its start for the first answers of the Kubernetes API.
pub(crate) const FIRST_ANSWERS_WITHIN: Duration = Duration::from_secs(15);

/// Time after which the same trouble with the Kubernetes API is logged again.
pub(crate) const TROUBLE_AGAIN_AFTER: Duration = Duration::from_mins(10);
