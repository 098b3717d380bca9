{{/* Name of the controller and of all that belongs to the release; `tote` for a release called tote. */}}
{{- define "tote.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tote.agent" -}}
{{ include "tote.fullname" . }}-agent
{{- end -}}

{{/* Labels that select pods; a component's label comes with them. */}}
{{- define "tote.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tote.labels" -}}
{{ include "tote.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: tote
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "tote.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* Name of the Secret and the ConfigMap that the controller keeps the certificate authority in. */}}
{{- define "tote.ca" -}}
{{ include "tote.fullname" . }}-ca
{{- end -}}

{{/* Name of a Secret with somebody else's certificate authority; empty if the controller makes its own. */}}
{{- define "tote.givenCA" -}}
{{- if and .Values.tls.existingSecret .Values.tls.certManager.enabled -}}
{{- fail "tls.existingSecret and tls.certManager.enabled: only one of them can be the certificate authority" -}}
{{- end -}}
{{- if eq .Values.tls.existingSecret (include "tote.ca" .) -}}
{{- fail (printf "tls.existingSecret: %s is the name of what the controller keeps itself; choose another" .Values.tls.existingSecret) -}}
{{- end -}}
{{- if .Values.tls.certManager.enabled -}}
{{ include "tote.fullname" . }}-cert-manager-ca
{{- else -}}
{{ .Values.tls.existingSecret }}
{{- end -}}
{{- end -}}

{{/* Port of config.metricsAddr. */}}
{{- define "tote.metricsPort" -}}
{{ regexFind "[0-9]+$" .Values.config.metricsAddr }}
{{- end -}}

{{/* Pod Security level that the release's namespace itself enforces; empty if none, or if there is no cluster to ask. */}}
{{- define "tote.podSecurity" -}}
{{- lookup "v1" "Namespace" "" .Release.Namespace | dig "metadata" "labels" "pod-security.kubernetes.io/enforce" "" -}}
{{- end -}}
