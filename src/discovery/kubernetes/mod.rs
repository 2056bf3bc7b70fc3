//! Engines as pods of Kubernetes: those with certain labels, or the members of an `InferencePool`,
//! with the objectives of that pool. Only pods that are ready; those that are ending, or were ready
//! before, are engines that drain.
//!
//! Everything is watched and nothing is polled. What is known stays while the API server is away.
//! Access is that of the process: its service account in a pod, `KUBECONFIG` elsewhere.

mod engine_pod;
mod event_ports;
mod listed;
mod members;
mod objectives;
mod objects;
mod pod_status;
mod pools;
#[cfg(test)]
mod tests;
mod troubles;
mod watcher;

use std::collections::BTreeMap;
use std::sync::Arc;

use kube::Config;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::engine::EngineSpec;
use crate::limits::FIRST_ANSWERS_WITHIN;
use crate::ports::Ports;
use engine_pod::EnginePod;
use event_ports::EventPorts;
use kvcellar_block::error::{Error, Result};
use watcher::Watcher;

/// Priorities of objectives by name.
pub type Priorities = Arc<BTreeMap<String, i32>>;

/// Which pods are engines.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ClusterOptions {
    /// Ready pods with these labels, e.g. `app=vllm`: every one is an engine.
    #[arg(long = "kubernetes-labels", value_name = "LABELS", group = "pods")]
    labels: Option<String>,
    /// An `InferencePool` of the Gateway API inference extension: an engine for each of its ready
    /// pods and target ports.
    #[arg(long, value_name = "NAME", group = "pods")]
    inference_pool: Option<String>,
    /// Namespace of the pods and of the pool, if it is not our own.
    #[arg(long = "kubernetes-namespace", value_name = "NAMESPACE", requires = "pods")]
    namespace: Option<String>,
    /// Ports where engines of the pool publish and replay events: PORT[:REPLAY-PORT], plus its
    /// number for each data-parallel rank. Unless given, 5557:5558 where the pool has one target
    /// port, and 5557:5657 where it has several.
    #[arg(long, value_name = "PORTS", requires = "inference_pool")]
    inference_pool_events: Option<String>,
}

impl ClusterOptions {
    /// Pods are asked for.
    pub(crate) fn is_given(&self) -> bool {
        self.labels.is_some() || self.inference_pool.is_some()
    }

    fn flag(&self) -> &'static str {
        if self.inference_pool.is_some() { "inference-pool" } else { "kubernetes-labels" }
    }

    fn event_ports(&self, target_ports: usize) -> Result<EventPorts> {
        let default = if target_ports > 1 { "5557:5657" } else { "5557:5558" };
        EventPorts::parse(self.inference_pool_events.as_deref().unwrap_or(default))
    }

    /// Begins to watch. Returns when the pods there are now are known. `with_objectives`: those of
    /// the pool are watched, too.
    ///
    /// # Errors
    /// [`Error::Config`] where something may not be watched or is not there, [`Error::TryLater`]
    /// where the API cannot be reached.
    pub(crate) async fn watch(&self, with_objectives: bool) -> Result<Cluster> {
        let config = Config::infer().await.map_err(|error| {
            let remedy = "Run in a pod with a service account's token, or set KUBECONFIG";
            Error::config(self.flag(), format!("no access to a Kubernetes API: {error}"), remedy)
        })?;
        self.watch_at(config, with_objectives).await
    }

    async fn watch_at(&self, config: Config, with_objectives: bool) -> Result<Cluster> {
        // A wrong flag is refused before anything is asked.
        self.event_ports(1)?;
        let mut watcher = Watcher::new(self, config, with_objectives)?;
        let known = tokio::time::timeout(FIRST_ANSWERS_WITHIN, watcher.until_known()).await;
        known.map_err(|_| Error::TryLater {
            what: "the Kubernetes API".to_owned(),
            holder: format!("it has not answered within {} s", FIRST_ANSWERS_WITHIN.as_secs()),
        })??;
        let (sender, state) = watch::channel(watcher.state());
        let mut task = JoinSet::new();
        task.spawn(watcher.keep(sender));
        Ok(Cluster { options: self.clone(), state, _task: task })
    }
}

/// What is known of a cluster.
#[derive(Debug, Clone, Default)]
struct ClusterState {
    pods: Arc<BTreeMap<String, EnginePod>>,
    /// Ports of the pool. `None`: there is no pool.
    target_ports: Option<Vec<u16>>,
    objectives: Priorities,
}

/// A cluster that is watched, until this is dropped.
#[derive(Debug)]
pub(crate) struct Cluster {
    options: ClusterOptions,
    state: watch::Receiver<ClusterState>,
    _task: JoinSet<()>,
}

impl Cluster {
    /// The engines there are now. `ports`: of pods that labels select.
    ///
    /// # Errors
    /// [`Error::Config`] where ports cannot be right.
    pub(crate) fn engines<E: EngineSpec>(&self, ports: &Ports<'_>) -> Result<Vec<E>> {
        let state = self.state.borrow().clone();
        if self.options.inference_pool.is_none() {
            let engine = |(name, ip, notes)| Ok(ports.engine::<E>(Some(name), ip)?.noted(notes));
            return members::of_labels(&state.pods).map(engine).collect();
        }
        let Some(target_ports) = state.target_ports else { return Ok(Vec::new()) };
        members::of_pool(&state.pods, &target_ports, self.options.event_ports(target_ports.len())?)
    }

    /// The priorities of the pool's objectives now.
    pub(crate) fn objectives(&self) -> Priorities {
        Arc::clone(&self.state.borrow().objectives)
    }

    /// Something else may be known since the last call for this waiter.
    pub(crate) fn waiter(&self) -> Waiter {
        Waiter(self.state.clone())
    }
}

/// Waits for changes in a cluster.
#[derive(Debug)]
pub(crate) struct Waiter(watch::Receiver<ClusterState>);

impl Waiter {
    /// Returns when something has changed.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // Whoever watches has ended, as the process does.
            std::future::pending::<()>().await;
        }
    }
}
