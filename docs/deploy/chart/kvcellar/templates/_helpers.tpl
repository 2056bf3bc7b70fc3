{{/* Name of what belongs to a release: the first part of all others. */}}
{{- define "kvcellar.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels that select the pods of a part: (list . "engine"). */}}
{{- define "kvcellar.selector" -}}
app.kubernetes.io/name: kvcellar-{{ index . 1 }}
app.kubernetes.io/instance: {{ include "kvcellar.name" (index . 0) }}
{{- end -}}

{{/* All labels of a part. */}}
{{- define "kvcellar.labels" -}}
{{ include "kvcellar.selector" . }}
app.kubernetes.io/part-of: kvcellar
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
{{- end -}}

{{/* An image: (list . .Values.engine.image). */}}
{{- define "kvcellar.image" -}}
{{- $image := index . 1 -}}
image: {{ printf "%s:%s" $image.repository (default (index . 0).Chart.AppVersion $image.tag) | quote }}
imagePullPolicy: {{ $image.pullPolicy | default "IfNotPresent" }}
{{- end -}}

{{/* Pools and stores belong to this user: it must not change. */}}
{{- define "kvcellar.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* What a container of the command may do: nothing. */}}
{{- define "kvcellar.commandSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Name of the pool. */}}
{{- define "kvcellar.pool" -}}
{{- .Values.inferencePool.name | default (include "kvcellar.name" .) -}}
{{- end -}}

{{/* Replays of ranks begin further away than there are ranks. */}}
{{- define "kvcellar.replayPort" -}}
{{- if gt (int .Values.engine.ranks) 1 }}5657{{ else }}5558{{ end -}}
{{- end -}}

{{/* How index and router find engines: (list . "5557:5558"), with the ports behind the name of the headless service. */}}
{{- define "kvcellar.places" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.inferencePool.enabled -}}
- --inference-pool={{ include "kvcellar.pool" $root }}
- --inference-pool-events=5557:{{ include "kvcellar.replayPort" $root }}
{{- else -}}
- --dns={{ include "kvcellar.name" $root }}-engine:{{ index . 1 }}
{{- end -}}
{{- end -}}

{{/* Access to the Kubernetes API, where a pool is watched. */}}
{{- define "kvcellar.account" -}}
{{- if .Values.inferencePool.enabled -}}
serviceAccountName: {{ include "kvcellar.name" . }}
automountServiceAccountToken: true
{{- else -}}
automountServiceAccountToken: false
{{- end -}}
{{- end -}}

{{/* Where images come from. */}}
{{- define "kvcellar.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What cannot work together. */}}
{{- define "kvcellar.check" -}}
{{- $engine := .Values.engine -}}
{{- if and (not $engine.tiers.hugepages) (ge (int $engine.tiers.dramGiB) (int $engine.memoryGiB)) -}}
{{- fail "engine.tiers.dramGiB: the pool counts against engine.memoryGiB. Raise that, or set engine.tiers.hugepages" -}}
{{- end -}}
{{- if and $engine.tiers.nvme.enabled (ge (int $engine.tiers.nvme.sizeGiB) (int $engine.tiers.nvme.volumeGiB)) -}}
{{- fail "engine.tiers.nvme.sizeGiB: the store must be smaller than its volume, engine.tiers.nvme.volumeGiB" -}}
{{- end -}}
{{- if and (gt (int $engine.ranks) 1) (not .Values.inferencePool.enabled) -}}
{{- fail "engine.ranks: several ranks in a pod are found as members of a pool only. Set inferencePool.enabled" -}}
{{- end -}}
{{- if and .Values.inferencePool.enabled .Values.inferencePool.create (not (and .Values.router.enabled .Values.router.extProc.enabled)) -}}
{{- fail "inferencePool.create: a pool needs a picker. Set router.extProc.enabled, or inferencePool.create=false" -}}
{{- end -}}
{{- if and .Values.inferencePool.objectives (not .Values.inferencePool.enabled) -}}
{{- fail "inferencePool.objectives: objectives are a pool's. Set inferencePool.enabled" -}}
{{- end -}}
{{- end -}}
