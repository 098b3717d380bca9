if obj.status == nil or obj.status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "the controller has not seen it as it is now" }
end
local imported = {}
for _, condition in ipairs(obj.status.conditions or {}) do
  if condition.type == "Imported" then
    imported = condition
  end
end
local status = "Progressing"
if obj.status.phase == "Imported" then
  status = "Healthy"
elseif obj.status.phase == "Failed" then
  status = "Degraded"
elseif imported.reason == "Suspended" or imported.reason == "Disabled" then
  status = "Suspended"
end
return { status = status, message = imported.message or "" }
