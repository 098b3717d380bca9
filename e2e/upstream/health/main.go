// Command health says what GitOps tools make of one object, JSON or YAML on standard input: the status by kstatus
// (Flux, kubectl's successors), or, with -lua, the health by a check as Argo CD has it, run by the interpreter that it
// has. Status on the first line, message on the rest.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
	"sigs.k8s.io/yaml"
)

func main() {
	script := flag.String("lua", "", "`file` of an Argo CD health check in Lua; kstatus without it")
	flag.Parse()
	said, message, err := judge(*script, os.Stdin)
	if err != nil {
		fmt.Fprintln(os.Stderr, "health:", err)
		os.Exit(1)
	}
	fmt.Printf("%s\n%s\n", said, message)
}

func judge(script string, object io.Reader) (said, message string, err error) {
	text, err := io.ReadAll(object)
	if err != nil {
		return "", "", err
	}
	text, err = yaml.YAMLToJSON(text)
	if err != nil {
		return "", "", err
	}
	// With whole numbers as such, as kstatus wants them; a kind is needed.
	read := &unstructured.Unstructured{}
	if err := read.UnmarshalJSON(text); err != nil {
		return "", "", err
	}
	if script != "" {
		return check(script, text)
	}
	result, err := status.Compute(read)
	if err != nil {
		return "", "", err
	}
	return result.Status.String(), result.Message, nil
}

// check runs a health check over an object, as Argo CD does (docs/operator-manual/health.md): the global obj is the
// object, and what is returned has a status and a message. Only what Argo CD opens to it is there.
func check(script string, text []byte) (said, message string, err error) {
	var object any
	if err := json.Unmarshal(text, &object); err != nil {
		return "", "", err
	}
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable,
	} {
		if err := state.CallByParam(lua.P{Fn: state.NewFunction(open), Protect: true}, lua.LString(name)); err != nil {
			return "", "", err
		}
	}
	state.SetGlobal("obj", value(state, object))
	if err := state.DoFile(script); err != nil {
		return "", "", err
	}
	returned, is := state.Get(-1).(*lua.LTable)
	if !is {
		return "", "", fmt.Errorf("%s returns a %s, not a table", script, state.Get(-1).Type())
	}
	return returned.RawGetString("status").String(), returned.RawGetString("message").String(), nil
}

// value makes of decoded JSON what Lua knows.
func value(state *lua.LState, of any) lua.LValue {
	switch of := of.(type) {
	case bool:
		return lua.LBool(of)
	case float64:
		return lua.LNumber(of)
	case string:
		return lua.LString(of)
	case []any:
		table := state.CreateTable(len(of), 0)
		for _, item := range of {
			table.Append(value(state, item))
		}
		return table
	case map[string]any:
		table := state.CreateTable(0, len(of))
		for key, item := range of {
			table.RawSetString(key, value(state, item))
		}
		return table
	default:
		return lua.LNil
	}
}
