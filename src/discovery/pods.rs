//! Engines as pods of Kubernetes: those with certain labels that are running.
//!
//! The pods are listed anew every few seconds. Access is that of the process: its service account
//! in a pod, `KUBECONFIG` elsewhere. Needs the right to list pods in the namespace.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::{Client, Config};

use kvcellar_block::error::{Error, Result};

/// Which pods are engines.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Pods {
    /// Running pods with these labels, e.g. `app=vllm`: every one is an engine. Listed again every
    /// few seconds.
    #[arg(long = "kubernetes-labels", value_name = "LABELS", required = false)]
    pub(crate) labels: String,
    /// Their namespace, if it is not our own.
    #[arg(long = "kubernetes-namespace", value_name = "NAMESPACE", requires = "labels")]
    pub(crate) namespace: Option<String>,
}

fn later(problem: impl std::fmt::Display) -> Error {
    Error::TryLater { what: "the Kubernetes API".to_owned(), holder: problem.to_string() }
}

impl Pods {
    /// Names and addresses of the pods there are now.
    ///
    /// # Errors
    /// [`Error::TryLater`] when the API cannot be reached or refuses.
    pub(crate) async fn look(&self) -> Result<Vec<(String, IpAddr)>> {
        let config = Config::infer().await.map_err(later)?;
        self.list(config).await
    }

    async fn list(&self, config: Config) -> Result<Vec<(String, IpAddr)>> {
        let namespace = self.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(later)?;
        let pods: Api<Pod> = Api::namespaced(client, &namespace);
        let found = pods.list(&ListParams::default().labels(&self.labels)).await.map_err(later)?;
        Ok(found.items.iter().filter_map(running).collect())
    }
}

/// A pod that runs and has an address is an engine.
fn running(pod: &Pod) -> Option<(String, IpAddr)> {
    let status = pod.status.as_ref().filter(|status| status.phase.as_deref() == Some("Running"))?;
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    Some((pod.metadata.name.clone()?, status.pod_ip.as_ref()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const PODS: &str = r#"{"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [
        {"metadata": {"name": "a"}, "status": {"phase": "Running", "podIP": "10.0.0.1"}},
        {"metadata": {"name": "b"}, "status": {"phase": "Pending"}},
        {"metadata": {"name": "c"}, "status": {"phase": "Running", "podIP": "fd00::1"}},
        {"metadata": {"name": "d", "deletionTimestamp": "2026-01-01T00:00:00Z"},
         "status": {"phase": "Running", "podIP": "10.0.0.4"}}]}"#;

    /// An API server that answers one request and returns its first line.
    async fn api(status: &str, body: &'static str) -> (Config, tokio::task::JoinHandle<String>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let status = status.to_owned();
        let task = tokio::spawn(async move {
            let (mut line, _) = listener.accept().await.expect("a request");
            let mut asked = vec![0; 8192];
            let len = line.read(&mut asked).await.expect("read");
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            line.write_all(answer.as_bytes()).await.expect("written");
            String::from_utf8_lossy(&asked[..len]).lines().next().unwrap_or_default().to_owned()
        });
        (Config::new(format!("http://{address}").parse().expect("an address")), task)
    }

    #[tokio::test]
    async fn running_pods_with_the_labels_are_engines() {
        let (config, asked) = api("200 OK", PODS).await;
        let pods = Pods { labels: "app=vllm".to_owned(), namespace: Some("llm".to_owned()) };
        let found = pods.list(config).await.expect("a list");
        let shown: Vec<_> = found.iter().map(|(name, address)| (name.as_str(), address.to_string())).collect();
        assert_eq!(shown, [("a", "10.0.0.1".to_owned()), ("c", "fd00::1".to_owned())]);
        let line = asked.await.expect("asked");
        assert!(line.contains("/api/v1/namespaces/llm/pods") && line.contains("labelSelector=app"), "{line}");
    }

    #[tokio::test]
    async fn a_refusal_is_said() {
        let (config, _asked) = api("403 Forbidden", r#"{"kind": "Status", "code": 403, "message": "no pods for you", "reason": "Forbidden", "status": "Failure"}"#).await;
        let pods = Pods { labels: "app=vllm".to_owned(), namespace: None };
        let error = pods.list(config).await.expect_err("refused").to_string();
        assert!(error.contains("Kubernetes"), "{error}");
    }
}
