"""Pairs of a text and code that a function holds without a label."""

from skillnet_corpora.study.code_pairs import derive_code_pairs, split_identifier

FUNCTION = '''async def read_CSVFile(self, file_path, *, max_rows=10, **kwargs):
    """left over text, # 这不是一条注释"""
    # 读取文件的全部内容，
    # 并且去掉空行: https://example.org/a
    with open(file_path, encoding="utf-8") as stream:
        # read every line that is not empty
        lines = [line for line in stream if line.strip()]
    rows = lines[:max_rows]  # 行尾的注释没有代码块
    # print("被注释掉的代码", file_path, rows)
    # total = sum(len(each) for each in lines)
    # short one
    total = max(len(each) for each in lines)
    # ======= 返回最后的结果 =======
    return {"rows": rows, "total": total, "path": file_path}'''


def test_a_comment_describes_the_lines_below_it_up_to_the_next_one() -> None:
    comments = [pair for pair in derive_code_pairs(FUNCTION) if pair.kind == "comment"]
    assert [(pair.line, pair.text, pair.code.split("\n")[0]) for pair in comments] == [
        (
            3,
            "读取文件的全部内容， 并且去掉空行",
            'with open(file_path, encoding="utf-8") as stream:',
        ),
        (
            6,
            "read every line that is not empty",
            "lines = [line for line in stream if line.strip()]",
        ),
        (13, "返回最后的结果", 'return {"rows": rows, "total": total, "path": file_path}'),
    ]
    # The first comment describes the inner block too, and no code switched off.
    assert comments[0].code.endswith("行尾的注释没有代码块")
    assert comments[1].code == "lines = [line for line in stream if line.strip()]"


def test_name_and_arguments_describe_the_body() -> None:
    (name,) = [pair for pair in derive_code_pairs(FUNCTION) if pair.kind == "name"]
    assert name.text == "read csv file file path max rows"
    assert name.code.startswith('"""left over text')
    assert "read_CSVFile" not in name.code
    assert name.code.endswith('"path": file_path}')
    assert split_identifier("getHTTPResponse_v2") == ["get", "http", "response", "v", "2"]


def test_short_texts_and_short_code_make_no_pair() -> None:
    assert derive_code_pairs("def get(self):\n    return self.values[0] + self.others[1]") == []
    assert derive_code_pairs("def read_all_rows(path):\n    return 1") == []
    assert derive_code_pairs("def broken(:") == []
    assert derive_code_pairs("") == []
    (one,) = derive_code_pairs("def count_all_rows(路径): return sum(1 for _ in open(路径))")
    assert one.code == "return sum(1 for _ in open(路径))"


def test_long_code_below_a_comment_is_cut() -> None:
    body = "\n".join(f"    value_{number} = {number}" for number in range(40))
    pairs = derive_code_pairs(f"def f():\n    # 给许多变量赋值\n{body}")
    assert len(pairs[-1].code.split("\n")) == 12
