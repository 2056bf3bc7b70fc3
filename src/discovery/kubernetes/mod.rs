//! Engines as pods of Kubernetes: those with certain labels, or the members of an `InferencePool`,
//! with the objectives of that pool. Only pods that are ready; those that are ending, or were ready
//! before, are engines that drain.
//!
//! Everything is watched and nothing is polled. What is known stays while the API server is away.
//! Access is that of the process: its service account in a pod, `KUBECONFIG` elsewhere.

mod listed;
mod members;
mod objects;
#[cfg(test)]
mod tests;
mod troubles;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::{BoxStream, SelectAll, select_all};
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Config, ResourceExt};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::engine::{EngineSpec, Ports};
use crate::limits::{FIRST_ANSWERS_WITHIN, OBJECTIVES_MAX, PODS_MAX};
use kvcellar_block::error::{Error, Result};
use listed::Listed;
use members::{EnginePod, EventPorts};
use objects::Pool;
use troubles::{Troubles, Watched};

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

type Event = watcher::Result<watcher::Event<DynamicObject>>;
type Events = BoxStream<'static, Event>;

/// Holds the watches, and what they have shown.
struct Watcher {
    client: Client,
    /// The pool's name.
    pool_name: Option<String>,
    /// The pods that are watched. `None`: not known yet.
    selector: Option<String>,
    pool_events: Option<Events>,
    pod_events: Option<Events>,
    objective_events: SelectAll<BoxStream<'static, (usize, Event)>>,
    pool: Listed<Pool>,
    pods: Listed<EnginePod>,
    objectives: [Listed<i32>; objects::OBJECTIVES.len()],
    pools_watched: Watched,
    pods_watched: Watched,
    objectives_watched: [Watched; objects::OBJECTIVES.len()],
    troubles: Troubles,
    /// It was said that there is no pool.
    is_missing: bool,
}

/// What one event of a watch has brought.
enum Step {
    Nothing,
    Changed,
    /// Engines cannot be known until it is over.
    Trouble(Box<(Watched, Error)>),
}

impl Step {
    fn of(has_changed: bool) -> Self {
        if has_changed { Self::Changed } else { Self::Nothing }
    }
}

impl Watcher {
    fn new(options: &ClusterOptions, config: Config, with_objectives: bool) -> Result<Self> {
        let namespace = options.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| {
            Error::config(options.flag(), format!("no access to a Kubernetes API: {error}"), "Look at KUBECONFIG")
        })?;
        let watched = |kind: ApiResource| Watched { kind, namespace: namespace.clone(), flag: options.flag() };
        let pools_watched = watched(objects::pools());
        let objectives_watched = objects::OBJECTIVES.map(|group| watched(objects::objectives(group)));
        let mut made = Self {
            pool_name: options.inference_pool.clone(),
            selector: None,
            pool_events: None,
            pod_events: None,
            objective_events: SelectAll::new(),
            pool: Listed::new("InferencePool", 1),
            pods: Listed::new("pod", PODS_MAX),
            objectives: [(); objects::OBJECTIVES.len()].map(|()| Listed::new("InferenceObjective", OBJECTIVES_MAX)),
            pods_watched: watched(objects::pods()),
            pools_watched,
            objectives_watched,
            client,
            troubles: Troubles::default(),
            is_missing: false,
        };
        if let Some(name) = &options.inference_pool {
            let alone = watcher::Config::default().fields(&format!("metadata.name={name}"));
            made.pool_events = Some(made.events(&made.pools_watched, alone));
        }
        if options.inference_pool.is_some() && with_objectives {
            let all = made.objectives_watched.iter().enumerate();
            let streams = all.map(|(at, watched)| {
                let events = made.events(watched, watcher::Config::default());
                events.map(move |event| (at, event)).boxed()
            });
            made.objective_events = select_all(streams.collect::<Vec<_>>());
        }
        if let Some(labels) = &options.labels {
            made.select(Some(labels.clone()));
        }
        Ok(made)
    }

    fn events(&self, watched: &Watched, config: watcher::Config) -> Events {
        let api = Api::namespaced_with(self.client.clone(), &watched.namespace, &watched.kind);
        watcher(api, config).default_backoff().boxed()
    }

    /// Watches other pods from now on. Those known before stay until the others are listed.
    fn select(&mut self, selector: Option<String>) {
        if self.selector == selector {
            return;
        }
        let events = |labels| self.events(&self.pods_watched, watcher::Config::default().labels(labels));
        self.pod_events = selector.as_deref().map(events);
        if selector.is_none() {
            self.pods = Listed::new("pod", PODS_MAX);
        }
        self.selector = selector;
    }

    fn is_known(&self) -> bool {
        let without_pool = self.pool_events.is_some() && self.pool.is_complete() && self.pool.known().is_empty();
        without_pool || self.pods.is_complete()
    }

    fn state(&self) -> ClusterState {
        // The extension's own objectives come first, and win.
        let objectives = self.objectives.iter().rev().flat_map(|listed| listed.known().clone()).collect();
        ClusterState {
            pods: Arc::new(self.pods.known().clone()),
            target_ports: self.pool.known().values().next().map(|pool| pool.target_ports.clone()),
            objectives: Arc::new(objectives),
        }
    }

    /// # Errors
    /// The first trouble that keeps engines from being known.
    async fn until_known(&mut self) -> Result<()> {
        while !self.is_known() {
            if let Step::Trouble(trouble) = self.step().await {
                return Err(trouble.1);
            }
        }
        Ok(())
    }

    async fn keep(mut self, state: watch::Sender<ClusterState>) {
        loop {
            match self.step().await {
                Step::Changed => drop(state.send_replace(self.state())),
                Step::Trouble(trouble) => {
                    self.troubles.on_trouble(&trouble.0, &trouble.1);
                }
                Step::Nothing => {}
            }
        }
    }

    /// Takes in the next event.
    async fn step(&mut self) -> Step {
        tokio::select! {
            event = next(&mut self.pool_events) => self.on_pool(event),
            event = next(&mut self.pod_events) => self.on_pod(event),
            Some((at, event)) = self.objective_events.next() => self.on_objective(at, event),
        }
    }

    fn on_pool(&mut self, event: Event) -> Step {
        let event = match passed(&mut self.troubles, &self.pools_watched, event) {
            Ok(event) => event,
            Err(step) => return step,
        };
        let is_listed = matches!(event, watcher::Event::InitDone);
        let has_changed =
            self.pool.on_event(event, DynamicObject::name_any, |object, _| objects::pool(object).map(Some));
        if !has_changed && !is_listed {
            return Step::Nothing;
        }
        let selector = self.pool.known().values().next().map(|pool| pool.selector.clone());
        if selector.is_none() && self.pool.is_complete() && !self.is_missing {
            let (name, namespace) = (self.pool_name.as_deref().unwrap_or_default(), &self.pools_watched.namespace);
            log::warn!("there is no InferencePool {name} in the namespace {namespace}: no engines until there is one");
        }
        self.is_missing = selector.is_none();
        self.select(selector);
        Step::Changed
    }

    fn on_pod(&mut self, event: Event) -> Step {
        let event = match passed(&mut self.troubles, &self.pods_watched, event) {
            Ok(event) => event,
            Err(step) => return step,
        };
        Step::of(self.pods.on_event(event, DynamicObject::name_any, EnginePod::read))
    }

    fn on_objective(&mut self, at: usize, event: Event) -> Step {
        let watched = &self.objectives_watched[at];
        if event.as_ref().is_err_and(Watched::is_absent) {
            // One of the groups is usual; and without any there are the router's flags.
            return Step::Nothing;
        }
        let event = match passed(&mut self.troubles, watched, event) {
            Ok(event) => event,
            Err(Step::Trouble(trouble)) => {
                // Requests go on without.
                self.troubles.on_trouble(watched, &trouble.1);
                return Step::Nothing;
            }
            Err(step) => return step,
        };
        let pool = self.pool_name.as_deref().unwrap_or_default();
        let read = |object: &DynamicObject, _: Option<&i32>| objects::priority(object, pool);
        Step::of(self.objectives[at].on_event(event, DynamicObject::name_any, read))
    }
}

/// An event that a watch brings; never, where there is no watch.
async fn next(events: &mut Option<Events>) -> Event {
    match events {
        Some(events) => match events.next().await {
            Some(event) => event,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// The event, or what its absence means.
fn passed(
    troubles: &mut Troubles,
    watched: &Watched,
    event: Event,
) -> std::result::Result<watcher::Event<DynamicObject>, Step> {
    match event {
        // A list has only been asked for.
        Ok(watcher::Event::Init) => Ok(watcher::Event::Init),
        Ok(event) => {
            troubles.on_event(watched);
            Ok(event)
        }
        Err(error) => Err(match watched.explain(&error) {
            Some(error) => Step::Trouble(Box::new((watched.clone(), error))),
            None => Step::Nothing,
        }),
    }
}
