{{- define "revmux.name" -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- end }}

{{- define "revmux.labels" -}}
app.kubernetes.io/name: revmux
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "revmux.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "revmux.name" .) }}
{{- else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "revmux.image" -}}
{{- $image := .Values.image }}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}{{ else }}{{ $image.repository }}:{{ $image.tag }}{{ end }}
{{- end }}

{{- define "revmux.artifacts" -}}
{{- if not (or .Values.mlflow.artifacts .Values.storage.enabled) }}{{ fail "storage.enabled is false, so set mlflow.artifacts to a URI such as s3://my-bucket/mlflow" }}{{ end -}}
{{ .Values.mlflow.artifacts | default (printf "%s/mlflow" .Values.storage.path) }}
{{- end }}
{{- define "revmux.claim" -}}{{ .Values.storage.existingClaim | default (printf "%s-storage" (include "revmux.name" .)) }}{{- end }}

{{- define "revmux.redisAddress" -}}
{{- .Values.gcsFaultTolerance.address | default (printf "%s-redis:6379" (include "revmux.name" .)) }}
{{- end }}

{{- define "revmux.redisSecret" -}}
{{- .Values.gcsFaultTolerance.passwordSecret | default (printf "%s-redis" (include "revmux.name" .)) }}
{{- end }}

{{- define "revmux.postgresSecret" -}}
{{- .Values.postgres.passwordSecret | default (printf "%s-postgres" (include "revmux.name" .)) }}
{{- end }}

{{- /* The password of a Secret that the chart creates: random at the first install, and unchanged by upgrades. */ -}}
{{- define "revmux.keptPassword" -}}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .name }}
{{- if $found }}{{ index $found.data "password" }}{{ else }}{{ randAlphaNum 32 | b64enc }}{{ end }}
{{- end }}

{{- /* A container that may do nothing but run its process. */ -}}
{{- define "revmux.securityContext" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* The pod of a Ray node. Arguments: root, container (its name), group (resources, nodeSelector and tolerations). */ -}}
{{- define "revmux.rayPod" -}}
{{- $values := .root.Values }}
metadata:
  # KubeRay's services select pods by its own app.kubernetes.io/name, so that label is left to it.
  labels:
    app.kubernetes.io/instance: {{ .root.Release.Name }}
    app.kubernetes.io/component: {{ .component }}
spec:
  serviceAccountName: {{ include "revmux.serviceAccount" .root }}
  securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000, fsGroupChangePolicy: OnRootMismatch}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ include "revmux.image" .root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext: {{- include "revmux.securityContext" .root | nindent 8 }}
      {{- if $values.modelCache.enabled }}
      env:
        - {name: HF_HOME, value: {{ $values.modelCache.path }}}
      {{- end }}
      {{- with $values.envSecret }}
      envFrom:
        - secretRef: {name: {{ . }}}
      {{- end }}
      resources: {{- toYaml .group.resources | nindent 8 }}
      volumeMounts:
        {{- if $values.storage.enabled }}
        - {name: storage, mountPath: {{ $values.storage.path }}}
        {{- end }}
        {{- if $values.modelCache.enabled }}
        - {name: models, mountPath: {{ $values.modelCache.path }}}
        {{- end }}
        - {name: shared-memory, mountPath: /dev/shm}
  volumes:
    {{- if $values.storage.enabled }}
    - name: storage
      persistentVolumeClaim: {claimName: {{ include "revmux.claim" .root }}}
    {{- end }}
    {{- if $values.modelCache.enabled }}
    - name: models
      persistentVolumeClaim: {claimName: {{ include "revmux.name" .root }}-models}
    {{- end }}
    - name: shared-memory  # Ray's object store
      emptyDir: {medium: Memory}
{{- end }}

{{- /* The Ray cluster of the server and of every job. Arguments: root, kind (server or job). Drivers run in a job's cluster. */ -}}
{{- define "revmux.cluster" -}}
{{- $values := .root.Values }}
rayVersion: {{ $values.rayVersion | quote }}
authOptions: {mode: token}  # the operator creates the token
enableInTreeAutoscaling: true
autoscalerOptions: {version: v2, idleTimeoutSeconds: {{ $values.idleSeconds }}}
headGroupSpec:
  rayStartParams: {num-cpus: "0", num-gpus: "0"}
  template: {{- include "revmux.rayPod" (dict "root" .root "container" "ray-head" "component" "head" "group" $values.head) | nindent 4 }}
workerGroupSpecs:
  {{- if eq .kind "job" }}
  - groupName: driver
    replicas: 0
    minReplicas: 0
    maxReplicas: {{ $values.driver.maxReplicas }}
    labels: {revmux-group: driver}
    rayStartParams: {num-gpus: "0", resources: '"{\"driver\": 1}"'}
    template: {{- include "revmux.rayPod" (dict "root" .root "container" "ray-worker" "component" "driver" "group" $values.driver) | nindent 6 }}
  {{- end }}
  - groupName: gpu
    replicas: 0
    minReplicas: 0
    maxReplicas: {{ $values.gpuWorkers.maxReplicas }}
    rayStartParams: {}
    template: {{- include "revmux.rayPod" (dict "root" .root "container" "ray-worker" "component" (printf "%s-worker" .kind) "group" $values.gpuWorkers) | nindent 6 }}
{{- end }}

{{- /* The name of a job: KubeRay allows 47 characters, and 36 for a job that repeats. Arguments: root, name, most. */ -}}
{{- define "revmux.jobName" -}}
{{- $name := printf "%s-%s" (include "revmux.name" .root) .name }}
{{- if gt (len $name) .most }}{{ fail (printf "the name %s has %d characters; KubeRay allows %d, so choose a shorter name" $name (len $name) .most) }}{{ end }}
{{- $name }}
{{- end }}

{{- /* A RayJob. Arguments: root, command. The driver runs on a node of the group `driver`. */ -}}
{{- define "revmux.job" -}}
{{- $values := .root.Values }}
entrypoint: {{ include "revmux.command" . | quote }}
entrypointNumCpus: 1
entrypointResources: '{"driver": 1}'
shutdownAfterJobFinishes: true
ttlSecondsAfterFinished: {{ $values.jobTtlSeconds }}
backoffLimit: {{ $values.jobRetries }}
rayClusterSpec: {{- include "revmux.cluster" (dict "root" .root "kind" "job") | nindent 2 }}
{{- end }}

{{- /* The command of a job, with the chart's own MLflow unless it names another tracking server. */ -}}
{{- define "revmux.command" -}}
{{- .command | trim }}
{{- if and .root.Values.mlflow.enabled (not (contains "--tracking.uri" .command)) }} --tracking.uri http://{{ include "revmux.name" .root }}-mlflow:5000{{ end }}
{{- end }}
