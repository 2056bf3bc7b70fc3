//! Engines as pods of Kubernetes: those with certain labels that are running.
//!
//! The pods are listed anew every few seconds. Access is that of the process: its service account in a pod, `KUBECONFIG` elsewhere. Needs the right to
//! list pods in the namespace.

use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::{Client, Config};

use super::sources::Source;
use crate::error::{Error, Result};
use crate::events::subscriber::Address;

/// Which pods are engines, and where they publish.
#[derive(Debug, Clone)]
pub struct Pods {
    /// A label selector, as `kubectl get pods -l` takes it.
    pub labels: String,
    /// Their namespace; the process's own unless given.
    pub namespace: Option<String>,
    /// Port of the PUB socket.
    pub port: u16,
    /// Port of the ROUTER socket.
    pub replay_port: Option<u16>,
}

fn later(problem: impl std::fmt::Display) -> Error {
    Error::TryLater { what: "the Kubernetes API".to_owned(), holder: problem.to_string() }
}

impl Pods {
    /// The engines there are now.
    ///
    /// # Errors
    /// [`Error::TryLater`] when the API cannot be reached or refuses.
    pub async fn look(&self) -> Result<Vec<Source>> {
        let config = Config::infer().await.map_err(later)?;
        self.list(config).await
    }

    async fn list(&self, config: Config) -> Result<Vec<Source>> {
        let namespace = self.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(later)?;
        let pods: Api<Pod> = Api::namespaced(client, &namespace);
        let found = pods.list(&ListParams::default().labels(&self.labels)).await.map_err(later)?;
        Ok(found.items.iter().filter_map(|pod| self.source(pod)).collect())
    }

    /// A pod that runs and has an address is an engine.
    fn source(&self, pod: &Pod) -> Option<Source> {
        let status = pod.status.as_ref().filter(|status| status.phase.as_deref() == Some("Running"))?;
        if pod.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let address: std::net::IpAddr = status.pod_ip.as_ref()?.parse().ok()?;
        let at = |port: u16| format!("tcp://{}", std::net::SocketAddr::new(address, port));
        Some(Source {
            name: pod.metadata.name.clone()?,
            model: None,
            address: Address { endpoint: at(self.port), replay: self.replay_port.map(at), bind: false },
        })
    }
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
        let pods = Pods {
            labels: "app=vllm".to_owned(),
            namespace: Some("llm".to_owned()),
            port: 5557,
            replay_port: Some(5558),
        };
        let found = pods.list(config).await.expect("a list");
        let shown: Vec<_> = found.iter().map(|it| (it.name.as_str(), it.address.endpoint.as_str())).collect();
        assert_eq!(shown, [("a", "tcp://10.0.0.1:5557"), ("c", "tcp://[fd00::1]:5557")]);
        assert_eq!(found[0].address.replay.as_deref(), Some("tcp://10.0.0.1:5558"));
        let line = asked.await.expect("asked");
        assert!(line.contains("/api/v1/namespaces/llm/pods") && line.contains("labelSelector=app"), "{line}");
    }

    #[tokio::test]
    async fn a_refusal_is_said() {
        let (config, _asked) = api("403 Forbidden", r#"{"kind": "Status", "code": 403, "message": "no pods for you", "reason": "Forbidden", "status": "Failure"}"#).await;
        let pods = Pods { labels: "app=vllm".to_owned(), namespace: None, port: 1, replay_port: None };
        let error = pods.list(config).await.expect_err("refused").to_string();
        assert!(error.contains("Kubernetes"), "{error}");
    }
}
